"""The records that travel with the project, and the pages that tell of them."""

import re
from collections import defaultdict
from pathlib import Path

import pytest

from cwac_lab.config.run import read
from cwac_lab.core.errors import ConfigError, MissingAsset
from cwac_lab.evaluation.objectives import tuning_error
from cwac_lab.report.grouping import records
from cwac_lab.report.views import views
from cwac_lab.results import select
from cwac_lab.results.archive import RECORDS, SAID, add, archived
from cwac_lab.results.store import runs
from support import tiny

OWN = Path(__file__).parents[3] / "experiments" / "sst2_drift"
TUNING, TUNED, ATTACKS, BETWEEN, AGNEWS, CHECKS = (
    OWN.parent / name
    for name in ("tuning", "sst2_tuned", "sst2_attacks", "sst2_between", "agnews_drift", "sst2_checks")
)
STORES = (OWN, TUNING, TUNED, ATTACKS, BETWEEN, AGNEWS, CHECKS)
ALL = sorted(path.parent for path in OWN.parent.glob(f"*/{RECORDS}"))


@pytest.mark.parametrize("root", STORES, ids=lambda root: root.name)
def test_every_record_is_read(root):
    told = []
    assert len(records(runs(root), told.append)) == len(archived(root)) > 0
    assert told == []
    assert not (root / "runs").exists()


@pytest.mark.parametrize("root", ALL, ids=lambda root: root.name)
def test_an_archive_written_again_has_the_same_bytes(root, tmp_path):
    add(tmp_path, runs(root), force=False, say=pytest.fail)
    for name in (RECORDS, SAID):
        assert (tmp_path / name).read_bytes() == (root / name).read_bytes()


def test_records_of_before_have_what_later_settings_said():
    told = [run for root in STORES for run in archived(root)]
    assert {(run.row["schema"], run.facts()["schema"]) for run in told} == {(2, 3)}
    assert {run.config()["data"]["near"] for run in told} == {"exact"}
    for part in (part for run in told for part in run.config()["constraint"].values()):
        assert part["_target_"].startswith("cwac_lab.defenses."), part


def test_the_tuning_page_shows_the_best_of_its_trials():
    page = (TUNING / "README.md").read_text()
    told = []
    rows = records(runs(TUNING), told.append)
    assert told == []
    assert {row["split"] for row in rows} == {"validation"}
    best = {}
    for run in runs(TUNING):
        metrics = run.read("metrics.json")
        best.setdefault(metrics["constraint"], []).append(tuning_error(metrics))
    said = dict(re.findall(r"\| `(\w+)` \| [^|]+ \| ([\d.]+) \|", page))
    assert said == {method: f"{min(errors):.1f}" for method, errors in best.items() if method != "none"}


# The activation part's strength is that of `coupled`, whose trials chose it.
CHOSEN = sorted({run.read("metrics.json")["constraint"] for run in runs(TUNING)} - {"activation"})
PROMPT = 2.0  # points of the sum: about one prompt of one rate; a default that is no worse than that stays


def today(method):
    """Return the settings of a method's parts as they are today."""
    return read(tiny.config(f"constraint={method}")).resolved["constraint"]


def defaults(method):
    """Return a method's settings of today, but for those that were chosen again at harder settings (`sst2_hard`)."""
    found = today(method)
    if "weight" in found:
        found["weight"] |= {"energy": 0.99, "opening": "counted"}
    return found


@pytest.mark.parametrize("method", CHOSEN)
def test_a_default_is_the_best_of_its_trials(method):
    trials = [run for run in runs(TUNING) if run.read("metrics.json")["constraint"] == method]
    errors = [tuning_error(run.read("metrics.json")) for run in trials]
    default = defaults(method)
    settings = [run.read("config.json")["constraint"] for run in trials]
    mine = [all(default[part][key] == value for part in each for key, value in each[part].items()) for each in settings]
    assert min(error for error, same in zip(errors, mine, strict=True) if same) <= min(errors) + PROMPT


def hard(**training):
    """Return the trials of the weight constraint alone at hard settings: configuration, training, metrics."""
    told = []
    for run in runs(OWN.parent / "sst2_hard"):
        config, metrics = run.config(), run.read("metrics.json")
        assert metrics["split"] == "validation"
        at = {"seed": config["seed"], **{key: config["trainer"][key] for key in ("learning_rate", "epochs")}}
        if (
            config["tuning"]["method"] == "full"
            and [*config["constraint"]] == ["weight"]
            and training.items() <= at.items()
        ):
            told.append((config["constraint"]["weight"], tuple(at.values()), metrics))
    return told


def test_the_opening_is_the_best_of_the_trials_at_four_times_the_rate():
    trials = [(weight, metrics) for weight, _, metrics in hard(seed=0, learning_rate=4e-4, epochs=2)]
    trials = [(weight, metrics) for weight, metrics in trials if weight["energy"] == 0.998]
    best = max(trials, key=lambda trial: trial[1]["retained_refusals"]["value"])[0]
    assert len(trials) == 3
    assert all(best[key] == today("weight")["weight"][key] for key in ("opening", "answers"))


def test_the_energy_has_the_least_errors_over_all_trainings_it_was_tried_at():
    errors = defaultdict(dict)
    for weight, training, metrics in hard():
        if (weight["opening"], weight["answers"], weight["directions"]) == ("held", "none", "leading"):
            assert training not in errors[weight["energy"]]
            errors[weight["energy"]][training] = tuning_error(metrics)
    chosen = today("weight")["weight"]["energy"]
    others = errors.keys() - {chosen}
    assert others == {0.998, 0.9995, 0.99999}
    for energy in others:
        assert errors[energy].keys() <= errors[chosen].keys()
        assert sum(errors[chosen][training] for training in errors[energy]) < sum(errors[energy].values()) - PROMPT


@pytest.mark.slow
def test_the_tuned_methods_ran_with_their_defaults():
    for run in runs(TUNED):
        facts, settings = run.read("metrics.json"), run.config()["constraint"]
        if facts["constraint"] != "start":
            default = defaults(facts["constraint"])
            assert settings.keys() == default.keys(), run.path.name
            known = {name: {key: default[name].get(key) for key in part} for name, part in settings.items()}
            assert settings == known, run.path.name  # later settings are not in it; their defaults change nothing


@pytest.mark.parametrize(
    "query",
    [
        "nothing == 1",
        "`sae.nothing` == 1",
        "seed ==",
        "seed == (",
        "seed + 1",
        "constraint > 3",
        "1",
        "seed == 0 or 1",
        "seed.nothing()",
        "harmful_score.value > 1",
        "seed.isna().head(1)",
    ],
)
def test_a_query_that_chooses_no_runs_is_one_line(query):
    with pytest.raises(ConfigError, match="accepted: a pandas query over the columns of results") as raised:
        select(OWN, "mine", query)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", ["[a, b]", "mine", "{}", "{mine: 3}", "{../mine: seed == 0}", "a: [b"])
def test_a_file_of_views_maps_names_to_queries(content, tmp_path):
    (tmp_path / "views.yaml").write_text(content)
    with pytest.raises(ConfigError, match=r"views.*accepted: a (YAML file that maps names of tables|name of letters)"):
        views(tmp_path / "views.yaml")
    with pytest.raises(MissingAsset, match="no such file"):
        views(tmp_path / "other.yaml")
