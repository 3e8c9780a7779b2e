"""What a sweep asks of runs that are finished: what their records have is not made again, what they lack is."""

import json
from pathlib import Path

import pytest

from cwac_lab import train
from cwac_lab.report.console import Screen
from cwac_lab.results.store import runs
from cwac_lab.run import asked
from cwac_lab.sweep import runner
from cwac_lab.sweep.cells import Cells
from support import tiny


def sweep(root, *cells):
    told = []
    found = list(runner.sweep(cells, 1, Screen(quiet=True), told.append, Cells(root)))
    return [outcome.status for outcome in found], told[0]


@pytest.mark.slow
def test_a_run_that_was_made_anew_and_asked_less_is_asked_again(tiny_folder, tmp_path):
    shared = [*tiny.small_run(tiny_folder, tmp_path), "constraint=none", "trainer.export=true"]
    cell = (*shared, "evaluation.perplexity=true")
    assert sweep(tmp_path, cell) == (["ok"], "1 runs, 0 recorded already")
    assert sweep(tmp_path, cell) == (["ok"], "1 runs, 1 recorded already")
    tiny.launch(train.main, [*shared, "force=true"])
    (run,) = runs(tmp_path)
    assert "perplexity" not in run.read("metrics.json")
    assert sweep(tmp_path, cell) == (["ok"], "1 runs, 0 recorded already, 1 asked for more")
    assert run.read("metrics.json")["perplexity"] is not None
    assert run.config()["evaluation"]["perplexity"] is True
    assert sweep(tmp_path, cell) == (["ok"], "1 runs, 1 recorded already")
    assert sweep(tmp_path, tuple(shared)) == (["ok"], "1 runs, 1 recorded already")


def test_what_settings_ask_for_is_there_with_its_details_and_suites_may_be_more(tiny_folder, tmp_path):
    tiny.launch(train.main, [*tiny.small_run(tiny_folder, tmp_path), "finetune=false"])
    (run,) = runs(tmp_path)
    plain = run.config()
    assert asked.answered(asked.asks(plain), run)
    more = json.loads(json.dumps(plain))
    more["evaluation"] |= {"perplexity": True, "plain_text": None}
    more["suites"] = {"a": {"n": 1}, "b": {"n": 2}}
    more["task"]["system_rates"] = not plain["task"].get("system_rates", False)
    assert not asked.answered(asked.asks(more), run)
    asked.note(more, run)
    assert asked.answered(asked.asks(more), run)
    assert asked.answered(asked.asks(plain), run)
    assert asked.answered(asked.asks({**more, "suites": {"a": {"n": 1}}}), run)
    assert not asked.answered(asked.asks({**more, "suites": {"a": {"n": 3}}}), run)
    written = Path(run.path / "config.json").read_text(encoding="utf-8")
    asked.note(plain, run)  # asks for nothing more, so nothing is written
    assert Path(run.path / "config.json").read_text(encoding="utf-8") == written
