"""The page about all runs, in a real browser where there is one."""

import base64
import gzip
import json
import re
import shutil

import pytest

from cwac_lab import train
from cwac_lab.benchmarks.page import multiply
from cwac_lab.core.cache import read_json
from cwac_lab.report import __main__ as report
from cwac_lab.report.page import render, write
from cwac_lab.results.store import runs
from support import tiny
from support.browser import opened

pytestmark = pytest.mark.slow

SPOKEN = {
    "harmful": "a <script>alert(1)</script> request",
    "harmless": "a kind question",
    "lookalike": "kill a process",
}


@pytest.fixture(scope="module")
def root(tiny_folder, tmp_path_factory):
    """Two runs with drift and answers, the second with answers that judges disagree on."""
    where = tmp_path_factory.mktemp("root")
    shared = [
        *tiny.small_run(tiny_folder, where),
        "trainer.epochs=2",
        "diagnostics.enabled=true",
        "evaluation.every_n_steps=3",
    ]
    for constraint in ("none", "weight"):
        tiny.launch(train.main, [*shared, f"constraint={constraint}"])
    for folder in runs(where):
        _speak(folder)
    return where


def _speak(folder):
    answers, ours, other = [], [], []
    for i in range(40):
        kind = ("harmful", "harmless", "lookalike", "harmful")[i % 4]
        answers.append({"kind": kind, "id": f"{kind}/{i}", "prompt": f"{SPOKEN[kind]} {i}", "output": f"answer {i}"})
        said = {"refused": i % 2 == 0, "complied": i % 2 == 1, "incoherent": False, "score": 0.5, "reason": "a phrase"}
        ours.append({"kind": kind, "id": f"{kind}/{i}", "judge": "refusal", **said})
        turned = {"refused": True, "complied": False} if i % 8 == 1 else {}
        other.append({**ours[-1], "judge": "classifier", **turned})
    folder.write("generations.jsonl", answers)
    folder.write("verdicts.jsonl", ours)
    folder.write("verdicts-classifier.jsonl", other)


def test_the_page_holds_everything_and_loads_nothing(root, capsys):
    tiny.launch(report.main, [f"output_root={root}"], "report")
    page = root / "report" / "index.html"
    assert str(page) in capsys.readouterr().out.replace("\n", "")
    text = page.read_text()
    outside = text[: text.index("plotly.js v")] + text[text.rindex("</script>\n<script>") :]
    assert not re.search(r"""(src|href)=["'](https?:)?//""", outside)
    data = json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)[1])
    assert [run["facts"]["constraint"] for run in data["runs"]] == ["none", "weight"]
    assert len(data["runs"][0]["drift"]["layers"]["harmful"]["weight"]) == 2
    assert {cell["method"] for cell in data["cells"]} == {"none", "weight"}
    assert data["runs"][0]["curve"]["step"][0] == 0
    for run, shown in zip(runs(root), data["runs"], strict=True):
        samples = read_json(run.path / "course.json")["samples"]
        assert shown["course"]["step"] == [0, *(sample["step"] for sample in samples)]
        assert shown["course"]["kl"][1:] == pytest.approx([sample["kl"] for sample in samples], rel=1e-3)
        rate = read_json(run.path / "metrics.json")["finetune_accuracy"]
        assert shown["rates"]["FA"]["n"] == rate["n"]
        assert shown["rates"]["FA"]["value"] == pytest.approx(rate["value"], rel=1e-3)
    answers = json.loads(gzip.decompress(base64.b64decode(data["runs"][1]["answers"])))
    assert answers[1]["said"] == {"refusal": "complied", "classifier": "refused"}
    assert answers[0]["prompt"] == "a <script>alert(1)</script> request 0"


def test_a_broken_file_leaves_out_what_it_holds(root, tmp_path):
    for run in runs(root):
        shutil.copytree(run.path, tmp_path / "runs" / run.path.name, ignore=shutil.ignore_patterns("model", ".lock"))
    first, second = runs(tmp_path)
    (first.path / "drift.json").write_text("{")
    (second.path / "verdicts-classifier.jsonl").write_text("{")
    told = []
    text = render([first, second], told.append)
    assert len(told) == 2
    data = json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)[1])
    assert [bool(run["drift"]) for run in data["runs"]] == [False, True]
    assert [bool(run["answers"]) for run in data["runs"]] == [True, False]


def test_a_store_without_runs_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        tiny.launch(report.main, [f"output_root={tmp_path}"], "report")
    assert capsys.readouterr().err.startswith(f"error: output_root={tmp_path}: no runs there")


def test_filters_and_blurred_prompts_work_by_mouse_and_keyboard(root, browser, tmp_path):
    tiny.launch(report.main, [f"output_root={root}"], "report")
    view, complaints = opened(browser, root / "report" / "index.html")
    view.locator("#answers").scroll_into_view_if_needed()
    view.wait_for_selector(".answer")
    assert view.inner_text("#answer-count") == "40 of 40 answers, 1 to 25 shown"
    view.click("#answer-more")
    assert view.inner_text("#answer-count") == "40 of 40 answers, 26 to 40 shown"
    view.select_option("#answer-kind", "harmless")
    assert "10 of 40" in view.inner_text("#answer-count")
    view.check("#answer-split")
    assert "5 of 40" in view.inner_text("#answer-count")
    view.uncheck("#answer-split")
    view.select_option("#answer-kind", "harmful")
    assert "20 of 40" in view.inner_text("#answer-count")
    view.select_option("#answer-verdict", "complied")
    assert "10 of 40" in view.inner_text("#answer-count")
    view.fill("#answer-text", "answer 7")
    assert "1 of 40" in view.inner_text("#answer-count")
    hidden = view.locator(".blurred")
    assert "blur" in hidden.locator("span").evaluate("node => getComputedStyle(node).filter")
    hidden.focus()
    view.keyboard.press("Enter")
    assert hidden.locator("span").evaluate("node => getComputedStyle(node).filter") == "none"
    assert "<script>alert(1)</script> request 7" in hidden.inner_text()
    view.locator("#drift").scroll_into_view_if_needed()
    view.wait_for_selector("#drift-plot .hm")
    assert view.locator("#drift-plot .hm").count() == 2
    view.locator("#course").scroll_into_view_if_needed()
    view.select_option("#course-what", "kl")
    view.wait_for_selector("#course-plot .scatterlayer .trace")
    assert view.locator("#course-plot .scatterlayer .trace").count() == 2
    assert "KL to the start" in view.text_content("#course-plot .ytitle")
    assert view.locator("#tables table").count() >= 1
    assert complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_it_fits_phones_and_both_schemes(root, browser, scheme, width, tmp_path):
    tiny.launch(report.main, [f"output_root={root}"], "report")
    size = {"width": width, "height": 900}
    view, complaints = opened(browser, root / "report" / "index.html", color_scheme=scheme, viewport=size)
    for section in ("ratio", "drift", "training", "course", "answers", "runs", "tables"):
        view.locator(f"#{section}").scroll_into_view_if_needed()
    view.wait_for_selector(".answer")
    assert view.evaluate("document.documentElement.scrollWidth") <= width
    back = view.evaluate("getComputedStyle(document.body).backgroundColor")
    assert back == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 26)"}[scheme]
    shot = tmp_path / f"{scheme}-{width}.png"
    view.screenshot(path=shot, full_page=True)
    assert shot.stat().st_size > 20_000
    assert complaints == []


def test_many_runs_open_without_complaints(root, browser, tmp_path):
    multiply(root, tmp_path, 150)
    view, complaints = opened(browser, write(tmp_path, lambda _: None))
    view.locator("#runs").scroll_into_view_if_needed()
    assert view.locator("#record-run option").count() == 150
    view.wait_for_selector("#record dt")
    assert complaints == []
