"""The page about all runs, in a real browser where there is one."""

import json
import re
import shutil
import time

import pytest

import tiny
from cwac_lab import train
from cwac_lab.cache import read_json, write_json, write_jsonl
from cwac_lab.report import __main__ as report
from cwac_lab.report.page import render
from cwac_lab.results.store import RunFolder, runs

BROWSER = shutil.which("chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
SPOKEN = {
    "harmful": "a <script>alert(1)</script> request",
    "harmless": "a kind question",
    "lookalike": "kill a process",
}


@pytest.fixture(scope="module")
def root(tiny_folder, tmp_path_factory):
    """Two runs with drift and answers, the second with answers that judges disagree on."""
    where = tmp_path_factory.mktemp("root")
    shared = [*tiny.small_run(tiny_folder, where), "trainer.epochs=2", "diagnostics.enabled=true"]
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
    assert "<script>alert(1)" not in text
    data = json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)[1])
    assert [run["facts"]["constraint"] for run in data["runs"]] == ["none", "weight"]
    assert len(data["runs"][0]["drift"]["layers"]["harmful"]["weight"]) == 2
    assert {cell["method"] for cell in data["cells"]} == {"none", "weight"}
    assert data["runs"][0]["curve"]["step"][0] == 0
    for run in runs(root):
        metrics = read_json(run.path / "metrics.json")
        assert f"{metrics['harmful_score']['n']}" in text


def test_a_store_without_runs_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        tiny.launch(report.main, [f"output_root={tmp_path}"], "report")
    assert capsys.readouterr().err.startswith(f"error: output_root={tmp_path}: no runs there")


@pytest.fixture(scope="module")
def browser():
    if BROWSER is None:
        pytest.skip("chromium is not installed")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as play:
        opened = play.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield opened
        opened.close()


def opened(browser, page, **settings):
    """Open a page; returns it with what its console complained of, and the seconds until it was drawn."""
    view = browser.new_page(**settings)
    complaints = []
    view.on("console", lambda told: complaints.append(told.text) if told.type in ("error", "warning") else None)
    view.on("pageerror", lambda error: complaints.append(str(error)))
    begin = time.perf_counter()
    view.goto(page.as_uri())
    view.wait_for_selector("#trade-plot .main-svg")
    return view, complaints, time.perf_counter() - begin


def test_filters_and_blurred_prompts_work_by_mouse_and_keyboard(root, browser, tmp_path):
    tiny.launch(report.main, [f"output_root={root}"], "report")
    view, complaints, _ = opened(browser, root / "report" / "index.html")
    view.wait_for_selector(".answer")
    assert view.inner_text("#answer-count") == "40 of 40 answers, 1 to 25 shown"
    view.click("#answer-more")
    assert view.inner_text("#answer-count") == "40 of 40 answers, 26 to 40 shown"
    view.select_option("#answer-kind", "harmful")
    assert "20 of 40" in view.inner_text("#answer-count")
    view.check("#answer-split")
    assert "5 of 40" in view.inner_text("#answer-count")
    view.uncheck("#answer-split")
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
    assert view.locator("#drift-plot .hm").count() == 2
    assert view.locator("#tables table").count() >= 1
    assert complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_it_fits_phones_and_both_schemes(root, browser, scheme, width, tmp_path):
    tiny.launch(report.main, [f"output_root={root}"], "report")
    size = {"width": width, "height": 900}
    view, complaints, _ = opened(browser, root / "report" / "index.html", color_scheme=scheme, viewport=size)
    view.wait_for_selector(".answer")
    assert view.evaluate("document.documentElement.scrollWidth") <= width
    back = view.evaluate("getComputedStyle(document.body).backgroundColor")
    assert back == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 26)"}[scheme]
    shot = tmp_path / f"{scheme}-{width}.png"
    view.screenshot(path=shot, full_page=True)
    assert shot.stat().st_size > 20_000
    assert complaints == []


def test_five_hundred_runs_open_in_two_seconds(root, browser, tmp_path):
    first = next(iter(runs(root)))
    many = tmp_path / "runs"
    for i in range(500):
        copy = RunFolder(many / f"{first.path.name[:-3]}{i:03}")
        shutil.copytree(first.path, copy.path, ignore=shutil.ignore_patterns("model", ".lock"))
        metrics = read_json(copy.path / "metrics.json")
        write_json(copy.path / "metrics.json", {**metrics, "seed": i})
        write_jsonl(copy.path / "generations.jsonl", first.read("generations.jsonl") * 1)
    page = tmp_path / "report" / "index.html"
    page.parent.mkdir()
    page.write_text(render(list(runs(tmp_path)), lambda _: None))
    taken = min(opened(browser, page)[2] for _ in range(3))
    assert taken < 2
