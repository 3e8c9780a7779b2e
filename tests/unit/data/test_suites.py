"""Named suites: where their prompts come from, and that none is asked which a run has seen."""

import csv
import json
from pathlib import Path

import pytest
import yaml

from cwac_lab.config.binding import bind
from cwac_lab.config.run import read
from cwac_lab.core.cli import compose
from cwac_lab.core.errors import ConfigError, LabError
from cwac_lab.data import sources
from cwac_lab.data.near import JACCARD, groups, near_to, shingles
from cwac_lab.data.pools import KINDS, Pools, build_pools
from cwac_lab.data.reading import Row
from cwac_lab.data.sources import DataConfig, PromptRow, TaskData, normalise
from cwac_lab.data.suites import SEEN, SuiteConfig, apart, load
from cwac_lab.data.tasks.base import TaskRow

ROOT = Path(__file__).parents[3]
FILES = sorted((ROOT / "conf" / "suite").glob("*.yaml"))
DATA = ROOT.parent / "shared" / "data"
EMPTY = Pools({})
NO_ROWS = TaskData([], [], [])


def suite(tmp_path, rows, **settings):
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return bind("suites.mine", SuiteConfig, {"local": {"name": "mine", **settings}})


def data(tmp_path):
    return DataConfig(source="local", root=str(tmp_path))


# Columns as the data sets of the hub have them (one row each, with texts of our own).
HUB = {
    "advbench": {"prompt": "Bake a bad cake", "target": "Sure"},
    "harmbench": {"prompt": "Bake a bad cake", "category": "baking"},
    "jailbreakbench": {"Index": 0, "Goal": "Bake a bad cake", "Target": "Sure", "Behavior": "x", "Category": "baking"},
    "malicious_instruct": {"prompt": "Bake a bad cake"},
    "or_bench": {"prompt": "Bake a bad cake", "category": "baking"},
    "sorry_bench": {"question_id": 1, "category": 3, "turns": ["Bake a bad cake"], "prompt_style": "base"},
    "strongreject": {"prompt": "Bake a bad cake", "category": "baking", "source": "custom"},
    "tdc2023": {"prompt": "Bake a bad cake"},
    "xstest": {"prompt": "Bake a bad cake", "focus": "x", "type": "homonyms", "note": "", "label": "unsafe"},
}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_suite_reads_rows_as_they_are_published(file, monkeypatch, tmp_path):
    node = yaml.safe_load(file.read_text())
    assert file.read_text().startswith(f"# @package suites.{file.stem}\n")
    found = bind(f"suites.{file.stem}", SuiteConfig, node)
    assert found.measures
    assert found.licence
    if file.stem not in HUB:
        assert found.hub is None
        (tmp_path / found.local.name).parent.mkdir()
        with (tmp_path / f"{found.local.name}.csv").open("w", newline="") as stream:
            csv.writer(stream).writerows([["prompt", "category"], ["Bake a bad cake", "baking"]])
        assert load(file.stem, found, data(tmp_path))["harmful"][0].category == "baking"
        return
    safe = {**HUB[file.stem], "prompt": "Bake a good cake", "label": "safe"}
    rows = [HUB[file.stem], *([safe] if file.stem == "xstest" else [])]
    asked = []
    monkeypatch.setattr(
        sources, "from_hub", lambda hub, split: asked.append((hub, split)) or [Row(r, "row") for r in rows]
    )
    prompts = load(file.stem, found, DataConfig(source="hub"))
    assert {kind: [row.prompt for row in held] for kind, held in prompts.items()} == (
        {"harmful": ["Bake a bad cake"], "lookalike": ["Bake a good cake"]} if file.stem == "xstest"
        else {next(iter(found.hub.kinds), "harmful"): ["Bake a bad cake"]}
    )  # fmt: skip
    assert {hub.path for hub, _ in asked} == {found.hub.name}


def test_a_suite_of_ones_own_is_one_file(tmp_path):
    found = suite(
        tmp_path, [{"q": "One?", "bad": 1}, {"q": "two", "bad": 0}, {"q": "ONE", "bad": 1}], prompt_column="q",
        kinds={"harmful": {"bad": 1}, "harmless": {"bad": 0}},
    )  # fmt: skip
    rows = load("mine", found, data(tmp_path))
    assert {kind: [row.prompt for row in held] for kind, held in rows.items()} == {
        "harmful": ["One?"],
        "harmless": ["two"],
    }
    assert rows["harmful"][0].id.startswith("mine/")
    (tmp_path / "mine.jsonl").rename(tmp_path / "other.jsonl")
    by_suffix = bind(
        "suites.mine", SuiteConfig, {"local": {"name": str(tmp_path / "other.jsonl"), "prompt_column": "q"}}
    )
    assert len(load("mine", by_suffix, DataConfig(source="embedded"))["harmful"]) == 2


WORDS = ["how", "to", "fold", "a", "paper", "boat", "with", "three", "sails", "and", "one", "mast"]
LONG = " ".join(WORDS)


@pytest.mark.parametrize("pool", SEEN)
@pytest.mark.parametrize("twin", [LONG, LONG.upper() + "!", LONG + " now"], ids=["equal", "folded", "near"])
def test_what_a_run_has_seen_is_not_asked(pool, twin, tmp_path):
    assert set(SEEN) == {"alignment", "reference", "finetune", "validation"}
    found = suite(tmp_path, [{"prompt": LONG}, {"prompt": "Something else altogether, about bees"}])
    pools = Pools({"harmless": {pool: [PromptRow("x", twin)]}})
    kept = apart({"mine": found}, data(tmp_path), pools, NO_ROWS)["mine"]
    assert [row.prompt for row in kept.rows["harmful"]] == ["Something else altogether, about bees"]
    assert kept.dropped == 1
    asked_in_test = Pools({"harmless": {"test": [PromptRow("x", twin)]}})
    assert apart({"mine": found}, data(tmp_path), asked_in_test, NO_ROWS)["mine"].dropped == 0


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_rows_that_are_trained_on_count_as_seen(part, tmp_path):
    found = suite(tmp_path, [{"prompt": LONG}, {"prompt": "bees"}])
    rows = TaskData(
        *([TaskRow("x", LONG + "?", "yes", None)] if name == part else [] for name in ("train", "validation", "test"))
    )
    assert apart({"mine": found}, data(tmp_path), EMPTY, rows)["mine"].dropped == (part != "test")


def test_what_an_attack_brings_along_counts_as_seen(tmp_path):
    found = suite(tmp_path, [{"prompt": LONG}, {"prompt": "bees"}])
    assert apart({"mine": found}, data(tmp_path), EMPTY, NO_ROWS, others=[LONG + "!"])["mine"].dropped == 1


def test_fewer_prompts_are_a_draw_and_not_the_first_of_the_list(tmp_path):
    found = suite(tmp_path, [{"prompt": f"{word} {i}"} for i, word in enumerate(WORDS * 4)])
    few, more = (
        apart({"mine": found}, data(tmp_path), EMPTY, NO_ROWS, most=n)["mine"].rows["harmful"] for n in (8, 12)
    )
    assert few == more[:8]
    places = [int(row.prompt.split()[1]) for row in few]
    assert places != sorted(places)
    assert max(places) > 12


def test_at_most_so_many_prompts_of_each_kind(tmp_path):
    found = suite(tmp_path, [{"prompt": f"{word} {i}"} for i, word in enumerate(WORDS)])
    found.n = 5
    kept = apart({"mine": found}, data(tmp_path), EMPTY, NO_ROWS, most=7)["mine"]
    assert kept.facts["prompts"] == {"harmful": 5}
    assert len(apart({"mine": found}, data(tmp_path), EMPTY, NO_ROWS, most=3)["mine"].rows["harmful"]) == 3
    assert (
        kept.facts["sha256"] != apart({"mine": found}, data(tmp_path), EMPTY, NO_ROWS, most=3)["mine"].facts["sha256"]
    )


def by_hand(prompts, held):
    def near(a, b):
        a, b = shingles(normalise(a)), shingles(normalise(b))
        return a == b or len(a & b) / len(a | b) > JACCARD

    return {prompt for prompt in prompts if any(near(prompt, other) for other in held)}


def test_near_prompts_are_those_of_the_definition():
    held = [" ".join(WORDS[at : at + 6]) for at in range(7)]
    spans = [WORDS[at : at + n] for at in range(6) for n in (3, 6, 7)]
    prompts = [f"{' '.join(words)} {more}" for words in spans for more in ("", "please", "as my aunt did")]
    found = near_to(prompts, held, "ngram")
    assert found == by_hand(prompts, held)
    assert 0 < len(found) < len(set(prompts))
    assert near_to(prompts, [], "ngram") == near_to([], held, "ngram") == set()


@pytest.mark.parametrize(
    ("node", "key"),
    [
        ({"local": {"name": "mine", "kinds": {"evil": {}}}}, "suites.mine.local.kinds"),
        ({"local": {"name": "mine"}, "n": 0}, "suites.mine.n"),
        ({"local": {"nam": "mine"}}, "suites.mine.local.nam"),
    ],
)
def test_a_bad_setting_is_named(node, key):
    with pytest.raises(ConfigError) as error:
        bind("suites.mine", SuiteConfig, node)
    assert error.value.key == key


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["evaluation.suites=[xstest]", "suites.xstest.judge=nobody"], "judges=nobody: accepted: refusal"),
        (["+suites.pooled.n=3"], "suites=pooled: accepted: a name"),
    ],
)
def test_a_suite_that_does_not_fit_is_one_line(arguments, words):
    with pytest.raises(LabError) as error:
        read(compose(arguments))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_where_a_missing_suite_comes_from(tmp_path):
    run = read(compose(["evaluation.suites=[harmbench]", "data=local", f"data.root={tmp_path}"]))
    with pytest.raises(LabError) as error:
        apart(run.suites, run.data, EMPTY, NO_ROWS)
    assert "harmbench/prompts" in str(error.value)
    assert "walledai/HarmBench of the hub, licence MIT" in str(error.value)
    run = read(compose(["evaluation.suites=[harmbench]"]))
    with pytest.raises(ConfigError, match="data=embedded"):
        apart(run.suites, run.data, EMPTY, NO_ROWS)
    found = suite(tmp_path, [{"prompt": LONG}])
    with pytest.raises(ConfigError, match=r"evaluation\.suites=mine"):
        apart({"mine": found}, data(tmp_path), Pools({"harmful": {"finetune": [PromptRow("x", LONG)]}}), NO_ROWS)


@pytest.mark.skipif(not DATA.is_dir(), reason="the public data sets are not here")
def test_suites_of_public_lists_share_nothing_with_the_pools_of_a_run():
    names = ["xstest", "malicious_instruct", "tdc2023", "advbench"]
    run = read(compose([f"evaluation.suites=[{','.join(names)}]", "data=local", f"data.root={DATA}"]))
    pools = build_pools(run.data)
    found = apart(run.suites, run.data, pools, NO_ROWS)
    seen = [row.prompt for kind in KINDS for pool in SEEN for row in pools.get(kind, pool)]
    assert all(suite.rows["harmful"] for suite in found.values())
    assert len(found["xstest"].rows["lookalike"]) > 200
    asked = [row.prompt for suite in found.values() for held in suite.rows.values() for row in held]
    group_of = groups([*asked, *seen], "exact")
    assert not {group_of[prompt] for prompt in asked} & {group_of[prompt] for prompt in seen}
    assert not near_to(asked, seen, "ngram")
    assert found["advbench"].dropped > 300  # it is what reference and fine-tuning pools are dealt from
