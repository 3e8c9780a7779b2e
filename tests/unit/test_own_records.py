"""The records that travel with the project, and the pages that tell of them."""

import re
from pathlib import Path

import pytest

from cwac_lab.config import INCIDENTAL
from cwac_lab.errors import ConfigError, MissingAsset
from cwac_lab.evaluation.verdicts import tuning_error
from cwac_lab.report.paired import differences
from cwac_lab.report.records import records
from cwac_lab.report.tables import markdown, summary
from cwac_lab.results import select
from cwac_lab.results.store import run_key, runs
from cwac_lab.tables import views

OWN = Path(__file__).parents[2] / "experiments" / "sst2_drift"
TUNING = OWN.parent / "tuning"
RESULTS = ("ablation", "ratio", "methods")


def test_every_record_is_read():
    told = []
    assert len(records(runs(OWN), told.append)) == len(list((OWN / "runs").iterdir()))
    assert told == []


@pytest.mark.parametrize("run", [*runs(OWN), *runs(TUNING)], ids=lambda run: run.path.name)
def test_a_record_keeps_its_key(run):
    """Settings that came later must not set records of before apart from the same runs of today."""
    told = run.read("provenance.json")
    content = {name: told[name] for name in ("weights_content", "base_content", "task_data_sha256", "pools_sha256")}
    assert run.path.name.endswith(run_key(run.read("config.json"), INCIDENTAL, content)[:8])


@pytest.mark.parametrize(("name", "query"), views(OWN / "tables.yaml").items())
def test_the_pages_show_what_the_records_say(name, query):
    page = OWN.parents[1] / "docs" / ("results.md" if name in RESULTS else "benchmarks.md")
    rows = records(select(OWN, name, query))
    table = summary(rows, name)
    assert {"start", "none", "coupled"} <= set(table["constraint"])
    assert (table["variant"] != "").any() == (name not in RESULTS)  # the settings of a method are its defaults there
    lines = [line for part in (table, differences(rows)) for line in markdown(part, "").splitlines()]
    assert sorted(line for line in lines if line.startswith("| ") and line not in page.read_text()) == []


def test_the_tuning_page_shows_its_trials():
    page = (TUNING / "README.md").read_text()
    told = []
    rows = records(runs(TUNING), told.append)
    assert told == []
    assert {row["split"] for row in rows} == {"validation"}
    lines = markdown(summary(rows, "tuning"), "").splitlines()
    assert [line for line in lines if line.startswith("| ") and line not in page] == []
    best = {}
    for run in runs(TUNING):
        metrics = run.read("metrics.json")
        best.setdefault(metrics["constraint"], []).append(tuning_error(metrics))
    said = dict(re.findall(r"\| `(\w+)` \| [^|]+ \| ([\d.]+) \|", page))
    assert said == {method: f"{min(errors):.1f}" for method, errors in best.items() if method != "none"}


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
