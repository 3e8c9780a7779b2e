"""Chosen columns and sorted rows, in all three files of a table; what LaTeX reads compiles."""

import csv
import io
import json
import re
import shutil
import subprocess

import pytest

from cwac_lab import tables
from cwac_lab.core.cache import write_text
from cwac_lab.core.errors import ConfigError
from cwac_lab.evaluation.combined import combined_of
from cwac_lab.report.files import page, write
from cwac_lab.report.grouping import SETTING, records
from cwac_lab.report.latex import escape, latex
from cwac_lab.report.layout import Layout
from cwac_lab.report.page import render
from cwac_lab.report.rates import checked
from cwac_lab.report.tables import markdown, numbers, summary
from cwac_lab.results.store import runs
from support import tiny
from support.recorded import record
from support.suites import asked_in


def cells(text):
    """Return the cells of a Markdown table, headings first, without what marks the best."""
    lines = [line for line in text.splitlines() if line.startswith("|") and "---" not in line]
    return [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines]


@pytest.fixture
def rows(tmp_path):
    """Four methods and a start; harmful prompts that they answer, and rows that they get right."""
    for constraint, hits, right in (("none", 90, 85), ("weight", 10, 80), ("coupled", 4, 82), ("lisa", 50, 90)):
        run = record(tmp_path, constraint, 0.2, 0, hits, right=right)
        stages = {"train": {"seconds": 10.0 * hits, "peak_memory_gb": 2.5}, "answer": {"seconds": 5.0}}
        stages["answer"]["peak_memory_gb"] = 3.25
        run.write("metrics.json", run.read("metrics.json") | {"stages": stages, "leak": hits / 1000})
    record(tmp_path, "start", None, 0, 2, right=None)
    return records(runs(tmp_path))


@pytest.mark.parametrize(
    ("columns", "heads"),
    [
        (["harmful_score", "finetune_accuracy"], ["HS ↓", "n", "FA ↑", "n"]),
        (["finetune_accuracy", "harmful_score"], ["FA ↑", "n", "HS ↓", "n"]),
        (["leak", "over_refusal"], ["leak", "over-refusal ↓", "n"]),
        (["retained_refusals"], ["retained refusals ↑", "n"]),
        (["seconds", "peak_memory_gb"], ["time, s ↓", "peak memory, GB ↓"]),
    ],
)
def test_columns_are_those_that_are_chosen_in_their_order(columns, heads, rows):
    chosen = Layout(tuple(columns))
    first, *others = cells(markdown(summary(rows, layout=chosen), layout=chosen))
    assert first == ["harmful_ratio", "constraint", "seeds", *heads]
    assert {len(other) for other in others} == {len(first)}
    told = list(numbers(rows, chosen))
    assert [name for name in told if name in columns] == columns
    assert not {"harmful_score", "finetune_accuracy", "leak"} - set(columns) & set(told)
    head = next(line for line in latex(rows, chosen).splitlines() if line.startswith("$p$"))
    assert head.count("$n$") == heads.count("n")


def test_a_broken_model_is_said_to_be_one_whatever_is_chosen(rows):
    rows[0]["broken"] = True
    chosen = Layout(("harmful_score",))
    assert "1 of 1" in markdown(summary(rows, layout=chosen), layout=chosen)
    assert sum(numbers(rows, chosen)["broken"]) == 1


@pytest.mark.parametrize(
    ("sort", "methods"),
    [
        (None, ["start", "none", "weight", "coupled", "lisa"]),
        ("harmful_score", ["start", "coupled", "weight", "lisa", "none"]),
        ("-harmful_score", ["none", "lisa", "weight", "coupled", "start"]),
        ("finetune_accuracy", ["weight", "coupled", "none", "lisa", "start"]),  # no value is last, in both directions
        ("-finetune_accuracy", ["lisa", "none", "coupled", "weight", "start"]),
        ("constraint", ["coupled", "lisa", "none", "start", "weight"]),
        ("-leak", ["none", "lisa", "weight", "coupled", "start"]),
        ("seconds", ["coupled", "weight", "lisa", "none", "start"]),
    ],
)
def test_rows_are_sorted_by_a_column(sort, methods, rows):
    by = Layout(sort=sort)
    assert summary(rows, layout=by)["constraint"].tolist() == methods
    assert numbers(rows, by)["constraint"].tolist() == methods


def test_rows_are_sorted_within_their_setting(tmp_path):
    for task, hits in (("agnews", 90), ("sst2", 10)):
        record(tmp_path, "none", 0.2, 0, hits, task)
        record(tmp_path, "weight", 0.2, 0, hits - 5, task)
    found = summary(records(runs(tmp_path)), layout=Layout(sort="harmful_score"))
    assert found[["task", "constraint"]].to_numpy().tolist() == [
        ["agnews", "weight"], ["agnews", "none"], ["sst2", "weight"], ["sst2", "none"],
    ]  # fmt: skip


def test_measures_stand_for_several_seeds(rows):
    (found,) = (
        numbers(rows, Layout(("seconds", "peak_memory_gb", "leak"))).query("constraint == 'lisa'").to_dict("records")
    )
    assert (found["seconds"], found["peak_memory_gb"], found["leak"]) == (505, 3.25, 0.05)


def test_a_csv_has_one_number_a_cell(rows, tmp_path):
    write(tmp_path, "mine", list(runs(tmp_path)))
    words = {*SETTING, "constraint", "variant", "rate", "baseline"}
    for name in ("mine.csv", "mine-differences.csv"):
        found = list(csv.DictReader(io.StringIO((tmp_path / "tables" / name).read_text())))
        assert found
        for row in found:
            values = {key: value for key, value in row.items() if key not in words}
            assert [float(value) for value in values.values() if value]
    (row,) = [row for row in found if (row["constraint"], row["rate"]) == ("coupled", "finetune_accuracy")]
    assert (row["difference"], row["n"], row["seeds"]) == ("-3.0", "100", "1")
    assert float(row["p"]) <= float(row["p_holm"])


def test_differences_are_of_the_rates_that_are_chosen(rows):
    text = page(rows, "mine", Layout(("finetune_accuracy", "leak")))
    assert "| FA - none |" in text
    assert "HS - none" not in text
    assert "Paired" not in page(rows, "mine", Layout(("leak",)))


def test_a_suite_has_columns_of_its_own(tmp_path):
    for constraint, hits in (("none", 9), ("weight", 1)):
        asked_in(record(tmp_path, constraint, 0.2, 0, 50), {"harmbench": hits, "sorry_bench": 2 * hits})
    found = records(runs(tmp_path))
    heads, *_ = cells(markdown(summary(found)))
    assert heads[3:9] == ["HS ↓", "n", "HS, harmbench ↓", "n", "HS, sorry_bench ↓", "n"]
    line = numbers(found).query("constraint == 'weight'").to_dict("records")[0]
    assert (line["harmful_score"], line["harmful_score_n"]) == (50, 100)  # the own pool counts its own prompts only
    assert (line["harmful_score/harmbench"], line["harmful_score/harmbench_n"]) == (5, 20)
    chosen = Layout(("harmful_score/sorry_bench",), "-harmful_score/sorry_bench")
    assert [row[1:4] for row in cells(markdown(summary(found, layout=chosen)))[1:]] == [
        ["none", "1", "90.0 [69.9, 97.2]"], ["weight", "1", "10.0 [2.8, 30.1]"],
    ]  # fmt: skip
    assert r"HS, sorry\_bench $\downarrow$" in latex(found, chosen)
    assert "HS, harmbench - none" in page(found, "mine")
    with pytest.raises(ConfigError, match=r"columns=harmful_score/other: accepted: .*harmbench \| .*sorry_bench"):
        summary(found, layout=Layout(("harmful_score/other",)))


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("columns=[harmful_score,fa]", "columns=fa: accepted: harmful_score | "),
        ("columns=[]", "columns=[]: accepted: different ones of harmful_score | "),
        ("columns=[leak,leak]", "columns=['leak', 'leak']: accepted: different ones of"),
        ("columns=[contrast]", "columns=contrast: accepted: harmful_score | "),
        ("columns=[harmful_score/]", "columns=harmful_score/: accepted: harmful_score | "),
        ("sort=hs", "sort=hs: accepted: harmful_ratio | constraint | variant | seeds | harmful_score | "),
        ("sort=-HS", "sort=-HS: accepted: harmful_ratio | "),
        ("metric=harmful_score", "metric=harmful_score: accepted: null without compare"),
    ],
)
def test_what_is_no_column_is_one_line_before_anything_is_read(argument, said, tmp_path, capsys):
    with pytest.raises(SystemExit):
        tiny.launch(tables.main, [f"output_root={tmp_path}/none", argument], "tables")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {said}")


def test_the_command_writes_what_is_chosen_and_again_when_that_changes(rows, tmp_path, capsys):
    first = [f"output_root={tmp_path}", "columns=[harmful_score]", "sort=-harmful_score"]
    for arguments, head in ((first, "HS ↓ | n |"), ([first[0], "columns=leak"], "leak |"), (first, "HS ↓ | n |")):
        tiny.launch(tables.main, arguments, "tables")
        assert f"| harmful_ratio | constraint | seeds | {head}\n" in capsys.readouterr().out
    assert [row[1] for row in cells((tmp_path / "tables" / "summary.md").read_text())[1:6]] == [
        "none", "lisa", "weight", "coupled", "start",
    ]  # fmt: skip


def test_the_mean_over_suites_and_a_contrast_are_columns_but_not_compared(tmp_path):
    for constraint, hits in (("none", 9), ("weight", 1)):
        run = asked_in(
            record(tmp_path, constraint, 0.2, 0, 50), {"harmbench": hits, "sorry_bench": 2 * hits, "xstest": 5}
        )
        more = [
            {"kind": "lookalike", "id": f"safe/{i}", "suite": "xstest", "complied": i >= hits, "refused": i < hits}
            | {"incoherent": False}
            for i in range(20)
        ]
        verdicts = [*run.read("verdicts.jsonl"), *more]
        run.write("verdicts.jsonl", verdicts)
        told = {name: each.rate([verdicts]).to_dict() for name, each in combined_of(verdicts).items()}
        run.write("metrics.json", run.read("metrics.json") | told)
    found = records(runs(tmp_path))
    line = numbers(found).query("constraint == 'weight'").to_dict("records")[0]
    assert line["harmful_score/pooled"] == pytest.approx((5 + 10) / 2)
    assert line["contrast/xstest"] == pytest.approx(75 - 5)
    text = page(found, "mine")
    assert "HS, pooled ↓ | n |" in text
    assert "contrast, xstest ↑ | n |" in text
    assert "pooled - none" not in text
    with pytest.raises(ConfigError, match="metric=harmful_score/pooled: accepted: "):
        checked("metric", "harmful_score/pooled")
    assert given(tmp_path)["contrast/xstest"] == {
        "title": "contrast, xstest ↑", "higher": True, "kinds": [], "base": "contrast", "suite": "xstest",
    }  # fmt: skip


def test_means_over_different_suites_share_no_column(tmp_path):
    asked = {"none": {"a": 9, "b": 3}, "weight": {"a": 1, "b": 2, "c": 4}}
    for constraint, hits in asked.items():
        run = asked_in(record(tmp_path, constraint, 0.2, 0, 50), hits)
        told = {name: each.rate([run.read("verdicts.jsonl")]).to_dict() for name, each in
                combined_of(run.read("verdicts.jsonl")).items()}  # fmt: skip
        run.write("metrics.json", run.read("metrics.json") | told)
    found = records(runs(tmp_path))
    assert "pooled" not in markdown(summary(found))
    assert "HS, pooled" in markdown(summary(found[:1]))
    with pytest.raises(ConfigError) as raised:
        summary(found, layout=Layout(("harmful_score/pooled",)))
    assert str(raised.value) == (
        "columns=harmful_score/pooled: accepted: a rate of one suite: "
        "these records have means over a, b and over a, b, c"
    )


def given(root):
    text = render(list(runs(root)))
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)[1])[
        "rates"
    ]


NASTY = '50%_#1 & {a} ~b ^c \\d <e> |f| "g" $h$ → ≤ é 中'


def test_signs_of_latex_are_escaped():
    assert escape("a_b & 5 % #1 $x$ {y} <z> |w|") == (
        r"a\_b \& 5 \% \#1 \$x\$ \{y\} \textless{}z\textgreater{} \textbar{}w\textbar{}"
    )
    assert escape("\\^~ ↑") == r"\textbackslash{}\textasciicircum{}\textasciitilde{} $\uparrow$"
    assert escape("é 中") == "é U+4E2D"


def test_latex_compiles(tmp_path):
    """Best, second, a failed run, a broken one, a suite; names with every sign that LaTeX reads as its own."""
    compiler = shutil.which("tectonic") or shutil.which("pdflatex")
    if compiler is None:
        pytest.skip("neither tectonic nor pdflatex is installed (Debian: texlive-latex-base)")
    for constraint, hits in (("none", 90), ("weight", 10), ("coupled", 4)):
        asked_in(record(tmp_path, constraint, 0.2, 0, hits), {"sorry_bench": hits // 10})
    record(tmp_path, "l2", 0.2, 0, 5, words=NASTY)
    record(tmp_path, "l2", 0.2, 1, 5, words="plain_")
    record(tmp_path, "lisa", 0.2, 0, 90).mark("failed", f"ValueError: {NASTY}")
    broken = record(tmp_path, "kl", 0.2, 0, 0)
    broken.write("metrics.json", broken.read("metrics.json") | {"broken": True, "weights": f"w {NASTY}"})
    found = records(runs(tmp_path))
    chosen = Layout(("harmful_score", "harmful_score/sorry_bench", "leak", "peak_memory_gb"), "harmful_score")
    body = f"{latex(found)}\n{latex(found, chosen)}"
    assert NASTY not in body
    lines = [r"\documentclass{article}", r"\usepackage{booktabs}", r"\begin{document}", body, r"\end{document}"]
    write_text(tmp_path / "paper.tex", "\n".join(lines))
    options = [] if "tectonic" in compiler else ["-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape"]
    made = subprocess.run(
        [compiler, *options, "paper.tex"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
    )
    assert made.returncode == 0, made.stdout[-2000:]
    assert (tmp_path / "paper.pdf").stat().st_size > 1000
