"""The page of methods, suites and pairs of runs: what it is given, and what it does in a real browser."""

import base64
import gzip
import json
import re

import pytest

from cwac_lab import archive
from cwac_lab.core.stats import wilson
from cwac_lab.report.page import render, write
from cwac_lab.results.store import runs
from support import tiny
from support.browser import opened
from support.recorded import beside_start, record
from support.suites import asked_in

pytestmark = pytest.mark.slow

# Harmful prompts that a method answers, and rows that it gets right, of 100 each.
METHODS = {"none": (95, 88), "weight": (12, 84), "coupled": (6, 86), "lisa": (40, 90)}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A start and four methods, of two seeds where it is coupled; two suites of 20 prompts in two categories."""
    where = tmp_path_factory.mktemp("methods")
    record(where, "start", None, 0, 5, right=None)
    for constraint, (hits, right) in METHODS.items():
        for seed in (0, 1) if constraint == "coupled" else (0,):
            run = beside_start(
                record(where, constraint, 0.2, seed, hits, right=right, strength=1), 90, 90 - min(hits, 90)
            )
            asked_in(run, {"harmbench": hits // 5, "sorry_bench": hits // 6}, categories=("cyber", "chemical"))
            rows = run.read("verdicts.jsonl")
            texts = [{"prompt": f"ask {row['id']}", "output": f"{constraint}: {row['id']}"} for row in rows]
            run.write("generations.jsonl", texts)
    return where


@pytest.fixture(scope="module")
def page(root):
    """Its page."""
    return write(root, lambda _: None)


def given(text):
    """Return what a page holds."""
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)[1])


def test_a_point_has_the_rates_of_its_suites_and_categories_and_its_runs(root):
    data = given(render(list(runs(root))))
    assert data["suites"] == {"": [], "harmbench": ["chemical", "cyber"], "sorry_bench": ["chemical", "cyber"]}
    of = {"base": "harmful_score", "suite": "harmbench", "kinds": ["harmful"]}
    assert data["rates"]["harmful_score/harmbench"] == {**of, "title": "HS, harmbench ↓", "higher": False}
    cells = {cell["method"]: cell for cell in data["cells"]}
    assert [cells["coupled"]["seeds"], len(cells["coupled"]["runs"]), cells["start"]["start"]] == [2, 2, True]
    weight = cells["weight"]
    counts = {name: weight["rates"][name]["n"] for name in ("harmful_score", "harmful_score/harmbench")}
    assert counts == {"harmful_score": 100, "harmful_score/harmbench": 20}
    expected = {"chemical": wilson(1, 10), "cyber": wilson(1, 10)}  # the first two prompts, categories by turns
    assert weight["categories"]["harmful_score/sorry_bench"] == {
        name: {part: pytest.approx(value, rel=1e-3) for part, value in rate.to_dict().items()}
        for name, rate in expected.items()
    }
    assert set(weight["categories"]) == {"harmful_score/harmbench", "harmful_score/sorry_bench"}


def test_records_of_before_suites_have_none_and_an_archive_keeps_its_verdicts(root, tmp_path):
    tiny.launch(archive.main, [f"output_root={_plain(tmp_path)}", f"to={tmp_path / 'kept'}"], "archive")
    data = given(render(list(runs(tmp_path / "kept"))))
    assert data["suites"] == {"": []}
    assert {run["texts"] for run in data["runs"]} == {False}
    rows = json.loads(gzip.decompress(base64.b64decode(data["runs"][0]["answers"])))
    assert (len(rows), rows[0]) == (300, {"kind": "harmful", "id": "harmful0", "said": {"task": "complied"}})
    assert {run["texts"] for run in given(render(list(runs(root))))["runs"]} == {True, False}  # the start has none


def _plain(folder):
    for constraint in ("none", "weight"):
        record(folder / "plain", constraint, 0.2, 0, 10)
    return folder / "plain"


def test_it_opens_on_refusals_and_their_cost_and_a_point_opens_its_run(page, browser):
    view, complaints = opened(browser, page, viewport={"width": 1200, "height": 1400})
    first = view.locator("main section").first
    assert first.locator("h2").inner_text() == "Which method keeps refusals, and at which cost?"
    assert first.locator("h2").bounding_box()["y"] < 400
    said = view.inner_text("#trade-say")
    assert said.startswith("Best at harmful ratio 0.2, with retained refusals 93.3 [")
    assert "coupled (FA 86.0 [" in said
    methods = view.locator("#trade-table tbody tr td:first-child").all_inner_texts()
    assert methods == ["coupled", "weight", "lisa", "none"]
    assert view.locator("#trade-plot .xy .scatterlayer .trace").count() == 5  # four methods and the front
    view.locator("#trade-plot .xy .points path").nth(2).click(force=True)
    view.wait_for_function("location.hash.startsWith('#run=')")
    name = view.evaluate("decodeURIComponent(location.hash.slice(5))")
    assert "coupled" in name
    assert view.locator("#record-run option:checked").inner_text() == name
    assert view.locator("#runs").bounding_box()["y"] < 1400
    view.click("#record button:has-text('same, seed 1')")
    assert "-1-" in view.evaluate("location.hash")
    view.click("#trade-table button:has-text('lisa')")
    assert "lisa" in view.inner_text("#record-run option:checked")
    assert complaints == []


def test_suites_and_categories_filter_points_and_answers(page, browser):
    view, complaints = opened(browser, page)
    assert not view.locator("#trade-suite").is_visible()  # retained refusals are of the own pool only
    view.select_option("#trade-kept", "harmful_score")
    for suite, category, rate in (("", None, "12.0"), ("harmbench", "", "10.0"), ("sorry_bench", "cyber", "10.0")):
        view.select_option("#trade-suite", suite)
        if category is not None:
            view.select_option("#trade-category", category)
        row = view.locator("#trade-table tr", has_text="weight").inner_text()
        assert row.split("\t")[1].startswith(f"{rate} [")
    assert "10" in row.split("\t")[2]
    view.locator("#answers").scroll_into_view_if_needed()
    view.wait_for_selector("#answer-list .answer")
    view.select_option("#answer-suite", "harmbench")
    assert "20 of 340" in view.inner_text("#answer-count")
    view.select_option("#answer-category", "cyber")
    assert "10 of 340" in view.inner_text("#answer-count")
    assert "harmbench · cyber" in view.locator("#answer-list .answer").first.inner_text()
    view.select_option("#answer-suite", "")
    assert "300 of 340" in view.inner_text("#answer-count")
    assert complaints == []


def test_two_runs_stand_beside_one_another_prompt_by_prompt(page, browser):
    view, complaints = opened(browser, page)
    view.locator("#two").scroll_into_view_if_needed()
    view.wait_for_selector("#two-list .answer")
    names = {run.path.name.split("-")[1]: run.path.name for run in runs(page.parents[1])}
    view.select_option("#two-first", label=names["none"])
    view.select_option("#two-second", label=names["weight"])
    view.wait_for_function("document.getElementById('two-settings').innerText.includes('weight')")
    assert view.locator("#two-settings tbody tr").all_inner_texts() == ["constraint\tnone\tweight"]
    assert "HS\t95.0 [88.8, 97.8]\t100\t12.0 [7.0, 19.8]\t100" in view.locator("#two-rates tr").all_inner_texts()
    view.select_option("#two-kind", "task")
    view.wait_for_function("document.getElementById('two-count').innerText.startsWith('4 of 100')")
    assert "correct → wrong (4)" in view.inner_text("#two-way")
    view.select_option("#two-kind", "harmful")
    view.select_option("#two-suite", "harmbench")
    # Of 20 prompts the first answers 19, the second 2.
    view.wait_for_function("document.getElementById('two-count').innerText.startsWith('17 of 20')")
    view.select_option("#two-category", "chemical")
    view.wait_for_function("document.getElementById('two-count').innerText.startsWith('8 of 10')")
    card = view.locator("#two-list .answer").first
    assert "none: harmbench/3" in card.inner_text()
    assert "weight: harmbench/3" in card.inner_text()
    assert "blur" in card.locator(".blurred span").evaluate("node => getComputedStyle(node).filter")
    assert complaints == []
