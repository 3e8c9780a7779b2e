import pytest

from cwac_lab.core.errors import ConfigError, LabError
from cwac_lab.report.grouping import records
from cwac_lab.report.paired import compare, differences
from cwac_lab.report.tables import markdown, summary
from cwac_lab.results.store import runs
from support.recorded import judged, record, settings


def compared(rows, comparison="HS - start"):
    """Return the rows of one comparison."""
    found = differences(rows)
    return found[found["comparison"] == comparison].to_dict("records") if len(found) else []


def test_two_methods_are_compared_on_the_same_items_and_seeds(tmp_path):
    for seed, (ours, other) in enumerate([(10, 30), (20, 30)]):
        record(tmp_path, "coupled", 0.2, seed, ours)
        record(tmp_path, "weight", 0.2, seed, other)
    record(tmp_path, "weight", 0.2, 2, 99)  # has no partner
    rows = records(runs(tmp_path))
    ours, other = ([row for row in rows if row["constraint"] == name] for name in ("coupled", "weight"))
    difference, p = compare(ours, other)
    assert (difference.value, difference.seeds, difference.n) == (-15, 2, 100)
    assert p < 0.01
    assert compare(other, ours)[0].value == 15
    assert (compare(ours, other, "over_refusal")[0].value, compare(ours, other, "over_refusal")[1]) == (0, 1)
    with pytest.raises(ConfigError, match="rate=leak: accepted: "):
        compare(ours, other, "leak")
    for row in other:
        row["config"]["trainer.learning_rate"] = 2
    with pytest.raises(LabError, match="no two runs to compare harmful_score of"):
        compare(ours, other)


@pytest.mark.parametrize(
    ("ratio", "seed", "config", "said"),
    [
        (0.1, 0, {}, r"ours: runs of 2 rows of a table.*ratio 0\.1 \| coupled.*ratio 0\.2 \| coupled.*their seed only"),
        (0.2, 1, {"weight": {"energy": 0.5}}, "ours: runs of 2 rows.*coupled weight.energy=0.5.*weight.energy=unset"),
        (0.2, 0, {}, "are one cell with one seed: remove one of them"),
    ],
)
def test_what_is_compared_are_seeds_of_one_method(ratio, seed, config, said, tmp_path):
    """Ratios, variants or repetitions are no seeds: pooled, their interval would be of something else."""
    for constraint in ("coupled", "weight"):
        record(tmp_path, constraint, 0.2, 0, 20)
        record(tmp_path, constraint, ratio, seed, 30, **config)
    if not config and ratio == 0.2:
        twin = record(tmp_path / "twin", "coupled", 0.2, 0, 20)
        twin.path.rename(tmp_path / "runs" / "twin")
    rows = records(runs(tmp_path))
    ours, other = ([row for row in rows if row["constraint"] == name] for name in ("coupled", "weight"))
    with pytest.raises(LabError, match=said):
        compare(ours, other)


def test_a_baseline_is_that_of_the_very_settings(tmp_path):
    """Two plain runs differ in a setting that is no trainer's: each method's run has the one that was asked as it."""
    for batch, plain, held in ((8, 90, 10), (64, 10, 10)):
        for constraint, hits in (("none", plain), ("l2", held)):
            run = record(tmp_path, constraint, 0.2, 0, hits, batch=batch)
            run.write("config.json", settings(constraint={"batch": batch}, evaluation={"batch_size": batch}))
    rows = records(runs(tmp_path))
    found = {row["variant"].partition(",")[0]: row["difference"].split()[0] for row in compared(rows, "HS - none")}
    assert found == {"batch=8": "-80.0", "batch=64": "+0.0"}
    for row in rows:
        row["config"].pop("evaluation.batch_size")
    for row in compared(rows, "HS - none"):
        assert row["difference"].startswith("n/a (2 runs of none fit: sst2-none-0.2-0-")
        assert row["p"] == row["n"] == row["seeds"] == ""


def test_starts_that_are_one_are_one_baseline(tmp_path):
    record(tmp_path, "start", None, 0, 5)
    record(tmp_path, "start", None, 1, 5)
    record(tmp_path, "l2", 0.2, 0, 25)
    (row,) = compared(records(runs(tmp_path)))
    assert row["difference"].startswith("+20.0 [")
    record(tmp_path, "start", None, 2, 15)
    (row,) = compared(records(runs(tmp_path)))
    assert row["difference"].startswith("n/a (3 runs of start fit: ")


@pytest.mark.parametrize(("hits", "shown"), [(95, "<0.0001"), (11, "0.031"), (5, "1")])
def test_a_small_p_is_shown_as_such(hits, shown, tmp_path):
    """Against five prompts that the start answers as well: McNemar's p of 90, 6 and 0 that only the run answers."""
    record(tmp_path, "start", None, 0, 5)
    record(tmp_path, "l2", 0.2, 0, hits)
    (row,) = compared(records(runs(tmp_path)))
    assert row["p"] == shown


def test_a_partner_was_asked_alike_and_a_broken_model_is_not_compared(tmp_path):
    for tokens in (48, 32):
        start = record(tmp_path, "start", None, 0, 80 if tokens == 48 else 10, tokens=tokens)
        start.write("config.json", settings(constraint={}, evaluation={"max_new_tokens": tokens}))
    for seed in range(2):
        run = record(tmp_path, "l2", 0.2, seed, 10)
        run.write("config.json", run.read("config.json") | {"evaluation": {"max_new_tokens": 32}})
    run.write("metrics.json", run.read("metrics.json") | {"broken": True})
    (row,) = compared(records(runs(tmp_path)))
    assert row["difference"] == "+0.0 [-3.7, +3.7]"
    assert (row["n"], row["seeds"]) == (100, 1)


def test_differences_are_paired_by_seed_and_item(tmp_path):
    """Accuracy against the plain run of the seed, refusals against the start; incoherent answers do not count."""

    def judge(run, right, refused):
        task = [{"kind": "task", "id": f"t{i}", "correct": i < right} for i in range(10)]
        asked = [
            {"kind": "harmful", "id": f"h{i}", "refused": i < refused, "complied": i >= refused, "incoherent": i == 9}
            for i in range(10)
        ]
        run.write("verdicts.jsonl", [*task, *reversed(asked)])

    for seed, (plain, held) in enumerate([(8, 6), (9, 9)]):
        judge(record(tmp_path, "none", 0.2, seed, 90), plain, 0)
        judge(record(tmp_path, "weight", 0.2, seed, 10), held, 8 - seed)
    judge(record(tmp_path, "none", 0.1, 0, 90), 0, 0)
    judge(record(tmp_path, "start", None, 0, 5), 0, 9)
    rows = records(runs(tmp_path))
    (row,) = compared(rows, "FA - none")
    assert row["constraint"] == "weight"
    assert row["difference"].startswith("-10.0 [")
    assert (row["n"], row["seeds"]) == (10, 2)
    (row,) = compared(rows)
    assert row["difference"].startswith("+16.7 [")  # 1 and 2 of 9 coherent answers
    assert compared(rows, "over-refusal - start") == []
    assert "Paired: w (c0ffee) | sst2" in markdown(differences(rows), "Paired: ")


def test_adapters_are_rows_and_partners_of_their_own(tmp_path):
    tuned = settings(constraint={}, trainer={"learning_rate": 1}, tuning={"method": "lora", "rank": 4})
    for constraint, right in (("none", 80), ("weight", 70)):
        record(tmp_path, constraint, 0.2, 0, 50, right=right)
        run = record(tmp_path / "apart", constraint, 0.2, 0, 50, right=right // 2)
        run.write("config.json", tuned)
        run.path.rename(tmp_path / "runs" / f"lora-{constraint}")
    rows = records(runs(tmp_path))
    assert summary(rows)["variant"].tolist() == ["tuning.method=full", "tuning.method=lora"] * 2
    assert [row["difference"].split()[0] for row in compared(rows, "FA - none")] == ["-10.0", "-5.0"]


def test_forms_of_asking_are_compared_apart(tmp_path):
    """As they stand 10 less 30 of 100, under the system prompt 50 less 90 of the same prompts."""
    for constraint, own, under in (("weight", 10, 50), ("none", 30, 90)):
        run = record(tmp_path, constraint, 0.2, 0, own)
        more = [row | {"form": "system"} for row in judged("harmful", under, 100, "complied")]
        run.write("verdicts.jsonl", [*run.read("verdicts.jsonl"), *more])
    rows = records(runs(tmp_path))
    for comparison, difference in (("HS - none", "-20.0"), ("HS, system - none", "-40.0")):
        (row,) = compared(rows, comparison)
        assert row["difference"].startswith(f"{difference} [")
        assert row["n"] == 100
