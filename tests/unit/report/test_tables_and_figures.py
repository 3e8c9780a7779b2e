import shutil

import pytest
from omegaconf import OmegaConf

from cwac_lab.core.cache import digest
from cwac_lab.core.errors import LabError
from cwac_lab.core.stats import wilson
from cwac_lab.report.figures import draw
from cwac_lab.report.grouping import grouped, records
from cwac_lab.report.latex import latex
from cwac_lab.report.page import render
from cwac_lab.report.paired import differences
from cwac_lab.report.rates import count_title
from cwac_lab.report.tables import averages, filled, markdown, numbers, summary
from cwac_lab.results.store import RunFolder, runs
from support import tiny
from support.recorded import beside_start, record, settings


def test_rows_are_means_over_seeds_and_start_comes_first(tmp_path):
    for seed, hits in enumerate((10, 20, 30)):
        record(tmp_path, "coupled", 0.2, seed, hits)
    record(tmp_path, "none", 0.2, 0, 90)
    record(tmp_path, "start", None, 0, 5)
    table = summary(records(runs(tmp_path)))
    assert table["constraint"].tolist() == ["start", "none", "coupled"]
    assert table["seeds"].tolist() == [1, 1, 3]
    assert table["HS ↓"][1] == str(wilson(90, 100))
    assert table["HS ↓"][2].startswith("20.0 [")
    assert table["HS ↓"][2].endswith("]")
    assert table[count_title("harmful_score")].tolist() == [100] * 3
    beside = numbers(records(runs(tmp_path))).to_dict("records")[2]
    assert (beside["harmful_score"], beside["harmful_score_n"], beside["seeds"]) == (20.0, 100, 3)
    assert (beside["harmful_score_lowest_seed"], beside["harmful_score_highest_seed"]) == (10.0, 30.0)
    rows, prompts = digest("sst2")[:8], digest("pools")[:8]
    assert f"w (c0ffee) | sst2, local data ({rows}, {prompts}), test split" in markdown(table)


def told_by(root, seed, judges):
    """Write a record that some judges tell the harmfulness of: name to version and value."""
    run = record(root, "weight", 0.2, seed, 10)
    (first, *_), metrics = judges, run.read("metrics.json")
    means = {
        name: {} if value is None else {"harmfulness": {"value": value, "low": value - 4, "high": value + 4, "n": 90}}
        for name, (_, value) in judges.items()
    }
    agreement = {"harmful": {"kappa": None, "n": 0}, "harmless": {"kappa": None, "n": 0}, "unparsable": 0}
    beside = {"agreement": agreement, "harmful_score": metrics["harmful_score"]}
    told = {
        name: {"version": version} | ({} if name == first else {**means[name], **beside})
        for name, (version, _) in judges.items()
    }
    run.write("metrics.json", metrics | means[first] | {"judges": told})


REFUSAL = {"refusal": ("3be1e32bf591cd0e", None)}


@pytest.mark.parametrize(
    ("judges", "cells"),
    [
        ([{"endpoint": ("1", 2.0)}] * 2, ["2.0 [0.0, 6.0]"]),
        ([{**REFUSAL, "endpoint": ("1", 10.0)}, {**REFUSAL, "endpoint": ("1", 12.0)}], ["11.0 [0.0, 23.7]"]),
        ([{**REFUSAL, "other": ("1", None), "endpoint": ("1", 10.0)}, REFUSAL], ["10.0 [6.0, 14.0], 1 of 2 runs"]),
        ([{**REFUSAL, "endpoint": ("1", 10.0)}, {**REFUSAL, "endpoint": ("2", 12.0)}], ["n/a"]),
        ([REFUSAL] * 2, []),
    ],
)
def test_harmfulness_has_a_column_where_a_judge_tells_it(judges, cells, tmp_path):
    for seed, named in enumerate(judges):
        told_by(tmp_path, seed, named)
    rows = records(runs(tmp_path), pytest.fail)
    shown = summary(rows)
    found = [cell for cell in shown["harmfulness ↓"] if "harmfulness ↓" in filled(shown)]
    assert found == [cell for cell in cells if cell[0].isdigit()]
    assert shown["harmfulness ↓"].tolist() == (cells or ["n/a"])
    assert ("harmfulness" in numbers(rows).columns) is bool(cells)


def test_the_loss_on_held_out_answers_has_a_column_where_it_is_known(tmp_path):
    for seed, loss in enumerate((1.0, 1.2)):
        told = {"value": loss, "low": loss - 0.05, "high": loss + 0.05, "n": 9}
        run = record(tmp_path, "coupled", 0.2, seed, 10)
        run.write("metrics.json", run.read("metrics.json") | {"held_out_loss": told})
    record(tmp_path, "none", 0.2, 0, 90)
    rows = records(runs(tmp_path))
    cells = summary(rows)["loss on held-out answers, nats ↓"].tolist()
    assert cells == ["n/a", "1.100 [-0.171, 2.371]"]  # Student's: 12.706 * 0.1, wider than 0.05 over rows
    assert numbers(rows)["held_out_loss"].tolist()[1] == pytest.approx(1.1)
    assert "loss on held-out answers, nats ↓ | n |" in markdown(summary(rows))
    assert "loss on held-out" not in markdown(summary([row for row in rows if row["constraint"] == "none"]))


def test_two_settings_of_one_constraint_are_two_rows(tmp_path):
    record(tmp_path, "weight", 0.2, 0, 10, energy=0.9)
    record(tmp_path, "weight", 0.2, 1, 40, energy=0.99)
    record(tmp_path, "l2", 0.2, 0, 40, strength=1)
    record(tmp_path, "l2", 0.2, 1, 40, strength=1.0)
    table = summary(records(runs(tmp_path)))
    assert table["variant"].tolist() == ["energy=0.9", "energy=0.99", ""]


def test_forms_of_reference_prompts_are_named_where_such_are_used(tmp_path):
    varied = {"name": "varied", "others": {"persona": {"prefix": "Obey. ", "template": None}}}
    for number, forms in enumerate((None, varied, {**varied, "others": {}})):
        for constraint in ("none", "coupled"):
            run = record(tmp_path, constraint, 0.2, 0, 10 * number, number=number)
            told = {"constraint": {}, **({"forms": forms} if forms else {})}
            run.write("config.json", run.config() | told)
            if constraint == "coupled":
                run.write("metrics.json", run.read("metrics.json") | {"prepared": {"reference": {"kept": 1}}})
    rows = [row for row in records(runs(tmp_path)) if row["constraint"] == "coupled"]
    named = [f"forms={forms['name']} {digest(forms)[:8]}" for forms in (varied, {**varied, "others": {}})]
    assert sorted(summary(rows)["variant"]) == sorted(["forms=own", *named])
    with pytest.raises(LabError, match="are one cell with one seed"):  # what is not held on to makes no difference
        summary(records(runs(tmp_path)))


def test_devices_are_no_setting_of_their_own(tmp_path):
    for seed, devices in enumerate((1, 1, 2)):
        run = record(tmp_path, "l2", 0.2, seed, 40, strength=1)
        run.write("config.json", run.config() | {"trainer": {"learning_rate": 1, "devices": devices}})
    record(tmp_path, "none", 0.2, 2, 90)
    rows = records(runs(tmp_path))
    (row,) = [row for row in summary(rows).to_dict("records") if row["constraint"] == "l2"]
    assert (row["variant"], row["seeds"]) == ("", 3)
    found = differences(rows)
    assert found.loc[found["comparison"] == "HS - none", "seeds"].tolist() == [1]


def test_tasks_are_averaged_alike_and_the_papers_value_stands_beside(tmp_path):
    for seed in range(2):
        record(tmp_path, "none", 0.2, seed, 90, "sst2", 80)
    record(tmp_path, "none", 0.2, 0, 60, "gsm8k", 20)
    rows = records(runs(tmp_path))
    (row,) = averages(rows, "main").to_dict("records")
    assert row["HS ↓"].startswith("75.0 [")
    assert row["FA ↑"].startswith("50.0 [")
    assert [row[count_title(name)] for name in ("harmful_score", "finetune_accuracy")] == [100, 200]
    assert (row["task"], row["runs"]) == ("mean of gsm8k, sst2", 3)
    assert "### w (c0ffee) | mean of gsm8k, sst2, local data (" in markdown(averages(rows))
    assert "paper HS" not in row  # its mean is over three tasks
    record(tmp_path, "none", 0.2, 0, 60, "agnews", 20)
    (row,) = averages(records(runs(tmp_path)), "main").to_dict("records")
    models = "Llama-2-7B 52.5, Llama-3-8B 66.0, Mistral-7B 64.5, Gemma-2-9B 42.2"
    assert row["paper HS"] == f"{models} (ratio not given)"
    table = summary(rows, "ratio").to_dict("records")
    assert [row["paper HS"] for row in table] == ["", "Llama-2-7B 74.9"]
    assert summary(rows, "ablation")["paper HS"].tolist() == ["", ""]
    assert summary(rows, "main")["paper FA"][0].endswith("Gemma-2-9B 90.7 (average of tasks, ratio not given)")
    assert "paper HS" not in summary(rows, "scope")
    assert averages(rows[:1]).empty


def test_a_task_that_is_not_judged_has_no_accuracy(tmp_path):
    for constraint in ("none", "coupled"):
        record(tmp_path, constraint, 0.2, 0, 60, "alpaca", None)
    rows = records(runs(tmp_path))
    assert summary(rows)["FA ↑"].tolist() == ["n/a"] * 2
    assert "FA - none" not in set(differences(rows)["comparison"])
    assert "n/a & 0 &" in latex(rows)
    record(tmp_path, "none", 0.2, 0, 90, "sst2", 80)
    (row,) = averages(records(runs(tmp_path))).to_dict("records")
    assert row["FA ↑"] == f"{wilson(80, 100)}, sst2 only"
    assert row["HS ↓"].startswith("75.0 [")
    for path in (tmp_path / "runs").glob("sst2*"):
        RunFolder(path).mark("failed", "stopped")
    record(tmp_path, "none", 0.2, 0, 60, "open", None)
    (row,) = averages(records(runs(tmp_path))).to_dict("records")
    assert row["FA ↑"] == "n/a (alpaca, open, sst2)"
    assert row["HS ↓"] == "n/a (sst2)"


def test_a_failed_run_shows_why(tmp_path):
    for seed in range(2):
        record(tmp_path, "none", 0.2, seed, 90)
    record(tmp_path, "none", 0.2, 1, 90).mark("failed", "MemoryError: too | large")
    record(tmp_path, "lisa", 0.2, 0, 90).mark("failed", "ValueError: no")
    (RunFolder(tmp_path / "runs" / "early")).mark("failed", "before it had weights")
    table = summary(records(runs(tmp_path)))
    assert table["seeds"].tolist() == [1, 0]
    assert table["failed"][0] == "1 of 2: MemoryError: too | large"
    assert table["HS ↓"][1] == table["FA ↑"][1] == "failed: ValueError: no"
    assert "too \\| large" in markdown(table)
    assert "failed: ValueError: no" in latex(records(runs(tmp_path)))
    assert draw(records(runs(tmp_path)), tmp_path, "mine") == []


def test_a_failed_run_is_in_the_row_of_its_peers(tmp_path):
    for seed in range(3):
        run = record(tmp_path, "coupled", 0.2, seed, 10)
        parts = OmegaConf.to_container(tiny.config("constraint=coupled").constraint)
        run.write("config.json", settings(constraint=parts, data={"reference": "refused"}, sae={"k": 32}))
        run.write("metrics.json", run.read("metrics.json") | {"prepared": {"features": {}, "reference": {}}})
    run.mark("failed", "MemoryError")
    (row,) = summary(records(runs(tmp_path))).to_dict("records")
    assert (row["seeds"], row["failed"], row["variant"]) == (2, "1 of 3: MemoryError", "")


def test_other_rows_prompts_or_questions_are_no_peers(tmp_path):
    """Runs on other data are other tables; with other settings of the task they are other rows."""
    record(tmp_path, "none", 0.2, 0, 90)
    other = record(tmp_path, "none", 0.2, 1, 90)
    other.write("provenance.json", other.read("provenance.json") | {"pools_sha256": "00000000more"})
    longer = record(tmp_path, "none", 0.2, 2, 90)
    longer.write("config.json", longer.read("config.json") | {"task": {"max_new_tokens": 200}})
    shorter = record(tmp_path, "none", 0.2, 3, 90)
    shorter.write("config.json", shorter.read("config.json") | {"task": {"max_new_tokens": 4}})
    unknown = record(tmp_path, "none", 0.2, 4, 90)
    assert unknown.read("config.json").get("task") is None  # a record of before that setting
    table = summary(records(runs(tmp_path)))
    assert table["prompts"].nunique() == 2
    assert sorted(table["variant"]) == ["", "", "task.max_new_tokens=200", "task.max_new_tokens=4"]


def test_records_that_cannot_be_read_are_told_and_the_others_count(tmp_path):
    record(tmp_path, "none", 0.2, 0, 90)
    old = record(tmp_path, "l2", 0.2, 0, 90)
    old.write("metrics.json", {k: v for k, v in old.read("metrics.json").items() if k != "schema"})
    (record(tmp_path, "kl", 0.2, 0, 90).path / "metrics.json").write_text("{")
    told = []
    assert [row["constraint"] for row in records(runs(tmp_path), told.append)] == ["none"]
    assert any("l2" in line and "has schema 1, accepted: 2" in line for line in told)
    assert any("kl" in line and "cannot be read" in line for line in told)


def test_a_record_from_before_a_setting_is_no_seed_of_one_with_it(tmp_path):
    record(tmp_path, "weight", 0.2, 0, 10, weight={"projection": "both"})
    record(tmp_path, "weight", 0.2, 0, 12, weight={"projection": "both", "restore_every_n_steps": 12})
    record(tmp_path, "coupled", 0.2, 0, 10, weight={"projection": "update"})
    record(tmp_path, "coupled", 0.2, 1, 12, weight={"projection": "update", "restore_every_n_steps": 12})
    record(tmp_path, "l2", 0.2, 0, 40, strength=1)
    record(tmp_path, "l2", 0.2, 0, 40, strength=1, mode="new")
    table = summary(records(runs(tmp_path)))
    name = "weight.restore_every_n_steps"
    assert table["variant"].tolist() == [f"{name}=1", f"{name}=12", "", "mode=new", "mode=unset"]
    assert table["seeds"].tolist() == [1, 1, 2, 1, 1]


def test_a_seed_does_not_count_twice(tmp_path):
    first = record(tmp_path, "l2", 0.2, 0, 40)
    shutil.copytree(first.path, tmp_path / "runs" / "copy")
    with pytest.raises(LabError, match=r"copy and .* are one cell with one seed|.* and .*copy are one cell"):
        summary(records(runs(tmp_path)))
    for seed in (0, 1):
        record(tmp_path / "starts", "start", None, seed, 5)
    assert summary(records(runs(tmp_path / "starts")))["seeds"].tolist() == [1]


def test_a_guard_is_told_where_runs_have_one_and_others_have_none(tmp_path):
    for name, guard in (("stop", {"kl": 0.05, "do": "stop"}), ("replay", {"kl": 0.05, "do": "replay"}), ("none", {})):
        run = record(tmp_path, "none", 0.2, 0, 10, name=name)
        run.write("config.json", settings(constraint={}, **({"guard": guard} if guard else {})))
    found = grouped(records(runs(tmp_path)))
    assert [entry["variant"] for entry, _ in found] == [
        "guard.kl=0.05, guard.do=replay", "guard.kl=0.05, guard.do=stop", "guard.kl=None",
    ]  # fmt: skip


def test_settings_that_a_run_did_not_use_do_not_split_a_row(tmp_path):
    for seed, (reference, size) in enumerate([("all", 8), ("refused", 16)]):
        run = record(tmp_path, "none", 0.2, seed, 90)
        run.write("config.json", settings(constraint={}, data={"reference": reference}, sae={"k": size}))
    table = summary(records(runs(tmp_path)))
    assert (table["seeds"].tolist(), table["variant"].tolist()) == ([2], [""])


def test_latex_marks_the_best_and_the_second_of_each_ratio(tmp_path):
    for constraint, hits in (("none", 90), ("weight", 10), ("coupled", 4), ("lisa", 50)):
        record(tmp_path, constraint, 0.2, 0, hits)
    record(tmp_path, "none", 0.1, 0, 70)
    record(tmp_path, "start", None, 0, 1)
    broken = record(tmp_path, "l2", 0.2, 0, 0)
    broken.write("metrics.json", broken.read("metrics.json") | {"broken": True})
    text = latex(records(runs(tmp_path)))
    lines = {tuple(line.split(" & ")[:2]): line for line in text.splitlines() if " & " in line}
    assert r"\textbf{4.0 [" in lines["0.2", "coupled"]
    assert r"\underline{10.0 [" in lines["0.2", "weight"]
    for plain in (("0.1", "none"), ("0.2", "lisa"), ("0.2", "l2 (broken: 1 of 1)"), ("--", "start")):
        assert lines[plain].split(" & ")[3][0].isdigit()
    assert text.count(r"\toprule") == 1
    assert r"95 \% interval" in text


def test_markdown_marks_what_is_best_as_printed_and_says_what_the_columns_are(tmp_path):
    for constraint, hits in (("none", 90), ("weight", 4), ("coupled", 4), ("lisa", 50)):
        record(tmp_path, constraint, 0.2, 0, hits, right=hits)
    record(tmp_path, "none", 0.1, 0, 70)  # alone at its ratio, so not the best of anything
    record(tmp_path, "start", None, 0, 1)
    broken = record(tmp_path, "l2", 0.2, 0, 0)
    broken.write("metrics.json", broken.read("metrics.json") | {"broken": True})
    lines = markdown(summary(records(runs(tmp_path)))).splitlines()
    assert lines[2].startswith(
        "Percent: mean over seeds [95 % interval]. ↓ lower is better, ↑ higher is better; bold is"
    )
    assert lines[4].startswith("| harmful_ratio | constraint | seeds | HS ↓ | n | FA ↑ | n | over-refusal ↓ | n |")
    cells = {tuple(line.split(" | ")[:2]): line.split(" | ")[3:7] for line in lines[6:]}
    for method in ("weight", "coupled"):
        assert cells["| 0.2", method] == ["**4.0 [1.6, 9.8]**", "100", "4.0 [1.6, 9.8]", "100"]
    assert cells["| 0.2", "none"] == ["90.0 [82.6, 94.5]", "100", "**90.0 [82.6, 94.5]**", "100"]
    for plain in (("| 0.1", "none"), ("| 0.2", "l2"), ("| 0.2", "lisa"), ("| ", "start")):
        assert "**" not in "".join(cells[plain])


def test_retained_refusals_stand_beside_hs_where_a_record_has_them(tmp_path):
    for root, known in ((tmp_path / "before", False), (tmp_path / "now", True)):
        for ratio, task in ((0.1, "sst2"), (0.2, "sst2"), (0.2, "gsm8k")):
            for method, kept in (("none", 10), ("coupled", 30)):
                run = record(root, method, ratio, 0, 50, task)
                if known:
                    beside_start(run, 40, kept)
        rows = records(runs(root))
        text = markdown(summary(rows)) + markdown(averages(rows))
        heads = [line for line in text.splitlines() if line.startswith("| harmful_ratio")]
        assert len(heads) == 3
        beside = "HS ↓ | n | retained refusals ↑ | n | FA ↑"
        assert all((beside in head) is known and ("retained" in head) is known for head in heads)
        assert ("retained" in latex(rows)) is known
        assert (">retained refusals ↑</th>" in render(list(runs(root)))) is known
        plain = [row for row in rows if row["constraint"] == "none" and row["task"] == "sst2"]
        (curve,) = [file for file in draw(plain, root, "mine") if file.suffix == ".svg"]
        assert ("retained refusals (%)" in curve.read_text()) is known
        paired = differences(rows)
        assert ("retained refusals - none" in set(paired["comparison"])) is known
    assert set(summary(rows)["retained refusals ↑"]) == {str(wilson(10, 40)), str(wilson(30, 40))}
    assert set(summary(rows)[count_title("retained_refusals")]) == {40}
    (found,) = {
        (row["difference"].split(" ")[0], row["n"])
        for row in paired.to_dict("records")
        if row["comparison"] == "retained refusals - none"
    }
    assert found == ("+50.0", 40)
