"""Figures of tables: the front, trade-offs, and curves of what was varied."""

import pytest
from matplotlib.figure import Figure

from cwac_lab.report.figures import course, draw, pareto
from cwac_lab.report.grouping import grouped, records
from cwac_lab.results.store import runs
from support.recorded import record


def test_the_front_holds_what_nothing_beats():
    assert pareto([(10, 80), (5, 70), (20, 90), (20, 85), (5, 60), (30, 90)]) == [1, 0, 2]


def test_methods_without_accuracy_have_no_trade_off(tmp_path):
    for constraint in ("none", "coupled"):
        run = record(tmp_path, constraint, 0.2, 0, 10)
        run.write("verdicts.jsonl", [row for row in run.read("verdicts.jsonl") if row["kind"] != "task"])
    assert draw(records(runs(tmp_path)), tmp_path, "mine") == []


@pytest.mark.slow
def test_figures_of_what_was_varied_are_the_same_every_time(tmp_path):
    for ratio in (0.1, 0.2):
        for seed in range(2):
            record(tmp_path, "none", ratio, seed, 90)
            for strength in (0.1, 1.0, 10.0):
                record(tmp_path, "l2", ratio, seed, 50, strength=strength, mode="a")
    record(tmp_path, "l2", 0.2, 0, 50, strength=1.0, mode="b")
    record(tmp_path, "start", None, 0, 5)
    rows = records(runs(tmp_path))
    files = draw(rows, tmp_path / "one", "mine")
    stem = files[0].name.partition("-trade_off")[0]
    assert stem.startswith("mine-sst2-")
    assert {path.name for path in files if path.suffix == ".png"} == {
        f"{stem}-{what}.png" for what in ("trade_off-p0.1", "trade_off-p0.2", "over-harmful_ratio", "over-strength")
    }  # fmt: skip
    for again in draw(rows, tmp_path / "two", "mine"):
        assert again.read_bytes() == (tmp_path / "one" / again.name).read_bytes()
    text = (tmp_path / "one" / f"{stem}-over-strength.svg").read_text()
    assert "l2, p=0.2, mode=a" in text
    assert "mode=b" not in text  # one value is no curve


def test_runs_that_were_followed_have_a_figure_over_steps(tmp_path):
    samples = [
        {"step": 5, "harmful_score": 60.0, "retained_refusals": 50.0, "kl": 0.4},
        {"step": 9, "harmful_score": 100.0, "retained_refusals": None, "kl": 0.9},
    ]
    for constraint in ("none", "weight"):
        for seed in (0, 1):
            run = record(tmp_path, constraint, 0.2, seed, 50)
            if seed or constraint == "none":
                run.write("course.json", {"start": {"harmful_score": 25.0}, "samples": samples})
    rows = records(runs(tmp_path))
    (file,) = [file for file in draw(rows, tmp_path / "figures", "mine") if "-course.svg" in file.name]
    text = file.read_text()
    assert "optimizer steps" in text
    assert text.count(">none<") == text.count(">weight<") == 1
    figure = Figure()
    course(figure, [(entry, group) for entry, group in grouped(rows)])
    lost, kept, apart = figure.axes
    assert [line.get_xydata().tolist() for line in lost.lines] == [[[0, 25], [5, 60], [9, 100]]] * 3
    assert [line.get_xydata().tolist() for line in kept.lines] == [[[0, 100], [5, 50]]] * 3
    assert [line.get_xydata().tolist() for line in apart.lines] == [[[0, 0], [5, 0.4], [9, 0.9]]] * 3
