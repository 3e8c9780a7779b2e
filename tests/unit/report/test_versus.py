"""Two methods on the same prompts and seeds, as a command: rates, difference, p, and the answers that differ."""

import csv
import shutil

import pytest
from scipy.stats import binomtest

from cwac_lab import archive, tables
from cwac_lab.core.errors import ConfigError, LabError
from cwac_lab.report.grouping import records
from cwac_lab.report.paired import compare
from cwac_lab.report.versus import Asked, compared, write
from cwac_lab.results.store import runs
from support import tiny
from support.recorded import beside_start, judged, record, settings
from support.suites import asked_in

PAIR = ("weight", "coupled")


def numbers(root, name):
    """Return the rows of a CSV file of a comparison."""
    with (root / "tables" / f"{name}.csv").open(encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def spoken(run):
    """Let a run keep its answers."""
    rows = [
        {"prompt": f"ask {row['id']}", "output": f"{run.path.name} {row['id']}"} for row in run.read("verdicts.jsonl")
    ]
    run.write("generations.jsonl", rows)


def test_one_seed_is_mcnemars_test_on_the_same_prompts(tmp_path, capsys):
    for constraint, hits in (("weight", 12), ("coupled", 4)):
        spoken(record(tmp_path, constraint, 0.2, 0, hits))
    tiny.launch(tables.main, [f"output_root={tmp_path}", "compare=[weight,coupled]"], "tables")
    told = capsys.readouterr().out
    name = "compare-weight-coupled-harmful_score"
    assert f"written: {tmp_path}/tables/{name}.md and {tmp_path}/tables/{name}.csv" in told
    assert f"answers that differ (8): {tmp_path}/tables/{name}-prompts.csv" in told
    p = binomtest(0, 8).pvalue
    both = "12.0 [7.0, 19.8] | 100 | 4.0 [1.6, 9.8] | 100"
    line = f"| 0.2 | HS ↓ | {both} | +8.0 [+3.0, +15.0] | {p:.2g} | 100 | 1 | 8 | 0 |"
    assert line in told
    assert line in (tmp_path / "tables" / f"{name}.md").read_text(encoding="utf-8")
    (row,) = numbers(tmp_path, name)
    assert (row["first"], row["second"], row["first_rate"], row["second_rate"]) == (*PAIR, "12.0", "4.0")
    assert float(row["p"]) == pytest.approx(p)
    assert [row[key] for key in ("difference", "n", "seeds", "only_first", "only_second")] == [
        "8.0",
        "100",
        "1",
        "8",
        "0",
    ]
    apart = numbers(tmp_path, f"{name}-prompts")
    assert [row["id"] for row in apart] == [f"harmful{i}" for i in sorted(map(str, range(4, 12)))]
    assert {(row["verdict_weight"], row["verdict_coupled"], row["kind"]) for row in apart} == {
        ("complied", "unknown", "harmful")
    }
    assert all(row["prompt"] == f"ask {row['id']}" and row["answer_weight"].endswith(f" {row['id']}") for row in apart)
    assert "weight" in apart[0]["answer_weight"]
    assert "coupled" in apart[0]["answer_coupled"]


def test_seeds_are_compared_as_from_python(tmp_path):
    for seed, (ours, other) in enumerate([(10, 30), (20, 30)]):
        record(tmp_path, "weight", 0.2, seed, ours)
        record(tmp_path, "coupled", 0.2, seed, other)
    record(tmp_path, "coupled", 0.2, 2, 99)  # has no partner
    rows = records(runs(tmp_path))
    (found,) = compared(rows, Asked(PAIR, "harmful_score"))
    first, second = ([row for row in rows if row["constraint"] == name] for name in PAIR)
    assert (found.difference, found.p) == compare(first, second)
    assert (found.only, len(found.apart)) == ((0, 30), 30)
    assert {row["seed"] for row in found.apart} == {0, 1}
    assert (found.sides[0].value, found.sides[1].value) == (pytest.approx(15), 30)


@pytest.mark.parametrize(
    ("rate", "difference"),
    [("finetune_accuracy", -20), ("over_refusal", 0), ("harmful_or_incoherent", 8), ("retained_refusals", -25)],
)
def test_any_rate_can_be_compared(rate, difference, tmp_path):
    for constraint, hits, right, kept in (("weight", 12, 60, 20), ("coupled", 4, 80, 30)):
        beside_start(record(tmp_path, constraint, 0.2, 0, hits, right=right), 40, kept)
    (found,) = compared(records(runs(tmp_path)), Asked(PAIR, rate))
    assert found.difference.value == difference


def test_every_setting_ratio_and_suite_has_a_row(tmp_path):
    for constraint, hits in (("weight", 5), ("coupled", 2)):
        for ratio in (0.1, 0.2):
            asked_in(record(tmp_path, constraint, ratio, 0, 50), {"harmbench": hits, "xstest": hits + 1})
        record(tmp_path, constraint, 0.2, 0, 10 * hits, "agnews")
    found = compared(records(runs(tmp_path)), Asked(PAIR, "harmful_score"))
    told = [(each.entry["task"], each.entry["harmful_ratio"], each.rate, each.difference.value) for each in found]
    suites = [("harmful_score", 0), ("harmful_score/harmbench", 15), ("harmful_score/xstest", 15)]
    assert told == [
        ("agnews", 0.2, "harmful_score", 30),
        *(("sst2", ratio, rate, difference) for ratio in (0.1, 0.2) for rate, difference in suites),
    ]
    assert [(row["id"], row["suite"], row["category"]) for row in found[2].apart] == [
        ("harmbench/2", "harmbench", "a"), ("harmbench/3", "harmbench", "b"), ("harmbench/4", "harmbench", "a"),
    ]  # fmt: skip
    (only,) = {each.rate for each in compared(records(runs(tmp_path))[2:], Asked(PAIR, "harmful_score/xstest"))}
    assert only == "harmful_score/xstest"
    with pytest.raises(ConfigError, match=r"metric=harmful_score/or: accepted: .*harmful_score/harmbench"):
        compared([row for row in records(runs(tmp_path)) if row["task"] == "sst2"], Asked(PAIR, "harmful_score/or"))


def test_a_variant_is_named_by_what_tells_it(tmp_path):
    for energy, hits in ((0.9, 30), (0.99, 10)):
        record(tmp_path, "weight", 0.2, 0, hits, energy=energy, layers=[1, 2])
    record(tmp_path, "coupled", 0.2, 0, 5)
    rows = records(runs(tmp_path))
    with pytest.raises(ConfigError, match=r'compare=weight: accepted: .*"weight energy=0.9" \| "weight energy=0.99"$'):
        compared(rows, Asked(PAIR, "harmful_score"))
    for name, difference in (("weight energy=0.9", 25), ("weight layers=[1, 2], energy=0.99", 5)):
        (found,) = compared(rows, Asked((name, "coupled"), "harmful_score"))
        assert found.difference.value == difference
    (found,) = compared(rows, Asked(("weight energy=0.9", "weight energy=0.99"), "harmful_score"))
    assert found.variants == ("energy=0.9", "energy=0.99")
    assert set(found.apart[0]) >= {"verdict_weight_1", "verdict_weight_2"}


def test_forms_are_called_by_their_name(tmp_path):
    """Without the hash that tables put behind it."""
    given = {"own": {}, "rows": {"rows": {"rows": 0.04}}}
    for number, (name, others) in enumerate(given.items()):
        run = record(tmp_path, "weight", 0.2, 0, [30, 10][number], number=number)
        run.write("config.json", settings(forms={"name": name, "others": others}))
        run.write("metrics.json", run.read("metrics.json") | {"prepared": {"reference": {}}})
    names = ("weight forms=rows", "weight forms=own")
    (found,) = compared(records(runs(tmp_path)), Asked(names, "harmful_score"))
    assert abs(found.difference.value) == 20


def with_trainer(run, **trainer):
    """Give a record other settings of training."""
    run.write("config.json", settings(constraint={}, trainer=trainer))
    return run


def test_runs_that_were_not_trained_alike_are_compared_where_a_name_tells_how(tmp_path):
    record(tmp_path, "coupled", 0.2, 0, 30)
    with_trainer(record(tmp_path, "weight", 0.2, 0, 10), learning_rate=2, epochs=1)
    rows = records(runs(tmp_path))
    with pytest.raises(LabError) as raised:
        compared(rows, Asked(PAIR, "harmful_score"))
    assert str(raised.value).endswith('(accepted: a name that tells it, "weight trainer.learning_rate=2")')
    with pytest.raises(ConfigError, match="epochs=3: accepted"):
        compared(rows, Asked(("weight trainer.epochs=3", "coupled"), "harmful_score"))
    asked = Asked(("weight trainer.learning_rate=2", "coupled"), "harmful_score")
    (found,) = compared(rows, asked)
    assert (found.difference.value, found.otherwise) == (-20, "trainer.learning_rate 2 and 1")
    assert "| trained otherwise |" in write(tmp_path, asked, lambda _: None)
    assert [row["trained_otherwise"] for row in numbers(tmp_path, asked.name)] == [found.otherwise]


@pytest.mark.parametrize(
    ("ours", "other", "names", "told"),
    [
        ({"method": "lora", "rank": 8}, {"method": "lora", "rank": 64}, ("lora", "lora"), None),
        ({"method": "null_space", "rank": 8}, {"method": "lora", "rank": 64}, ("null_space", "lora"), None),
        (
            {"method": "null_space", "free_directions": 8},
            {"method": "lora", "rank": 8},
            ("null_space", "lora"),
            "tuning.method null_space and lora",
        ),
    ],
)
def test_ways_of_tuning_bring_settings_of_their_own(ours, other, names, told, tmp_path):
    for name, tuning in (("weight", ours), ("coupled", other)):
        run = record(tmp_path, name, 0.2, 0, 10)
        run.write("config.json", settings(constraint={}, trainer={"learning_rate": 1}, tuning=tuning))
    asked = Asked(
        tuple(f"{name} tuning.method={method}" for name, method in zip(PAIR, names, strict=True)), "harmful_score"
    )
    if told is None:
        with pytest.raises(LabError, match=r"asked alike: .*tuning.rank 8 and 64"):
            compared(records(runs(tmp_path)), asked)
    else:
        (found,) = compared(records(runs(tmp_path)), asked)
        assert found.otherwise == told


def test_a_guard_is_no_part_of_a_constraint(tmp_path):
    record(tmp_path, "weight", 0.2, 0, 10)
    run = record(tmp_path, "coupled", 0.2, 0, 30)
    run.write("config.json", settings(constraint={}, trainer={"learning_rate": 1}, guard={"kl": 0.05, "do": "stop"}))
    rows = records(runs(tmp_path))
    with pytest.raises(LabError, match=r"asked alike: guard.kl None and 0.05 \(accepted: a name that tells it"):
        compared(rows, Asked(PAIR, "harmful_score"))
    (found,) = compared(rows, Asked(("weight", "coupled guard.kl=0.05"), "harmful_score"))
    assert found.otherwise == "guard.kl None and 0.05"


def test_what_was_asked_otherwise_is_no_pair_whatever_a_name_tells(tmp_path):
    for name, length in (("weight", 48), ("coupled", 96)):
        run = record(tmp_path, name, 0.2, 0, 10)
        told = settings(constraint={}, trainer={"learning_rate": 1}, evaluation={"max_new_tokens": length})
        run.write("config.json", told)
    asked = Asked(("weight evaluation.max_new_tokens=48", "coupled"), "harmful_score")
    with pytest.raises(LabError, match=r"asked alike: evaluation.max_new_tokens 48 and 96$"):
        compared(records(runs(tmp_path)), asked)


def test_long_names_have_files_of_their_own(tmp_path):
    names = [f"weight {'energy=0.9, ' * 30}trainer.learning_rate={rate}" for rate in (1, 2)]
    files = {Asked((name, "coupled"), "harmful_score").name for name in names}
    assert len(files) == 2
    for file in files:
        (tmp_path / f"{file}-prompts.csv").touch()


def test_the_start_stands_beside_every_ratio(tmp_path):
    record(tmp_path, "start", None, 0, 5)
    for ratio in (0.1, 0.2):
        for seed in (0, 1):
            record(tmp_path, "coupled", ratio, seed, 25)
    found = compared(records(runs(tmp_path)), Asked(("coupled", "start"), "harmful_score"))
    assert [(each.entry["harmful_ratio"], each.difference.value, each.difference.seeds) for each in found] == [
        (0.1, 20, 2), (0.2, 20, 2),
    ]  # fmt: skip
    turned = compared(records(runs(tmp_path)), Asked(("start", "coupled"), "harmful_score"))
    assert [each.difference.value for each in turned] == [-20, -20]


def test_a_broken_model_is_left_out_and_said(tmp_path):
    for constraint in PAIR:
        for seed in (0, 1):
            run = record(tmp_path, constraint, 0.2, seed, 10)
            if constraint == "weight" and seed == 1:
                run.write("metrics.json", run.read("metrics.json") | {"broken": True})
    (found,) = compared(records(runs(tmp_path)), Asked(PAIR, "harmful_score"))
    assert (found.difference.seeds, found.why) == (1, "without 1 of 2 pairs, which have a broken model")
    assert [side.n for side in found.sides] == [100, 100]
    (found,) = compared(records(runs(tmp_path)), Asked(PAIR, "finetune_accuracy"))
    assert (found.difference.seeds, found.why) == (2, "")
    for row in (rows := records(runs(tmp_path))):
        row["broken"] = True
    (found,) = compared(rows, Asked(PAIR, "harmful_score"))
    assert (found.difference, found.why) == (None, "n/a (a model is broken)")
    assert [side.value for side in found.sides] == [None, None]


def test_an_archive_is_compared_by_ids(tmp_path, capsys):
    for constraint, hits in (("weight", 12), ("coupled", 4)):
        spoken(record(tmp_path, constraint, 0.2, 0, hits))
    kept = tmp_path / "kept"
    tiny.launch(archive.main, [f"output_root={tmp_path}", f"to={kept}"], "archive")
    told = []
    text = write(kept, Asked(PAIR, "harmful_score"), told.append)
    assert text == write(tmp_path, Asked(PAIR, "harmful_score"), told.append)
    assert "answers that differ (8, 8 of them without texts" in told[2]
    assert {row["prompt"] for row in numbers(kept, "compare-weight-coupled-harmful_score-prompts")} == {""}


def test_where_nothing_differs_no_list_is_left(tmp_path):
    for constraint in PAIR:
        record(tmp_path, constraint, 0.2, 0, 12 if constraint == "weight" else 4)
    prompts = tmp_path / "tables" / "compare-weight-coupled-harmful_score-prompts.csv"
    write(tmp_path, Asked(PAIR, "harmful_score"), lambda _: None)
    assert prompts.is_file()
    shutil.rmtree(next((tmp_path / "runs").glob("*weight*")))
    record(tmp_path, "weight", 0.2, 0, 4)
    told = []
    write(tmp_path, Asked(PAIR, "harmful_score"), told.append)
    assert told[-1] == "answers that differ: none"
    assert not prompts.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["compare=[weight]"], r"compare=['weight']: accepted: two methods as tables name them"),
        (["compare=weight"], "compare=weight: accepted: two methods as tables name them"),
        (["compare=[weight,weight]"], "compare=['weight', 'weight']: accepted: two methods"),
        (["compare=[weight,lisa]"], "compare=lisa: accepted: a method that is recorded there: weight | coupled"),
        (["compare=['weight energy=1',coupled]"], "compare=weight energy=1: accepted: a method that is recorded"),
        (["compare=[weight,coupled]", "metric=hs"], "metric=hs: accepted: harmful_score | "),
        (["compare=[weight,coupled]", "exp=main"], "exp=main: accepted: null with compare"),
        (["compare=[weight,coupled]", "columns=[leak]"], "columns=['leak']: accepted: null with compare"),
    ],
)
def test_what_cannot_be_compared_is_one_line(arguments, said, tmp_path, capsys):
    for constraint in PAIR:
        record(tmp_path, constraint, 0.2, 0, 10)
    told = tiny.error_of(tables.main, [f"output_root={tmp_path}", *arguments], capsys, "tables")
    assert told.startswith(said)
    assert not (tmp_path / "tables").exists()


@pytest.mark.parametrize(
    ("ratio", "seed", "trainer", "said"),
    [
        (0.1, 0, 1, "none of both were made at one harmful ratio in one setting"),
        (0.2, 1, 1, r"no seed is that of both: \[0\] and \[1\]"),
        (0.2, 0, 2, "they were not trained and asked alike: trainer.learning_rate 1 and 2"),
    ],
)
def test_runs_that_are_no_pair_are_said_to_be_none(ratio, seed, trainer, said, tmp_path):
    record(tmp_path, "weight", 0.2, 0, 10)
    run = record(tmp_path, "coupled", ratio, seed, 10)
    run.write("config.json", settings(constraint={}, trainer={"learning_rate": trainer}))
    with pytest.raises(LabError, match=said):
        compared(records(runs(tmp_path)), Asked(PAIR, "harmful_score"))


def test_prompts_under_a_system_prompt_are_listed_in_their_form(tmp_path):
    for constraint, under in (("weight", 50), ("coupled", 49)):
        run = record(tmp_path, constraint, 0.2, 0, 10)
        more = [row | {"form": "system"} for row in judged("harmful", under, 100, "complied")]
        run.write("verdicts.jsonl", [*run.read("verdicts.jsonl"), *more])
    (found,) = compared(records(runs(tmp_path)), Asked(PAIR, "harmful_score_system"))
    assert [(row["id"], row["form"]) for row in found.apart] == [("harmful49", "system")]
