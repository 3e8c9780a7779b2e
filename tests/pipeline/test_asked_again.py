"""What a sweep asks of runs that are finished: what their records have is not made again, what they lack is."""

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

    def holds(**groups):
        more = {name: plain[name] | settings for name, settings in groups.items()}
        return asked.answered(asked.asks({**plain, **more}), run)

    samples = {"enabled": True, "every_n_steps": 2}
    assert holds()
    assert not holds(evaluation={"perplexity": True})
    assert not holds(diagnostics=samples)
    asked.note({**plain, "diagnostics": plain["diagnostics"] | samples}, run)
    assert holds(diagnostics=samples)
    assert holds(diagnostics={"enabled": True, "every_n_steps": 0})  # which is less
    assert not holds(diagnostics={"enabled": True, "every_n_steps": 3})
    asked.note({**plain, "diagnostics": plain["diagnostics"] | {"enabled": True}}, run)
    assert holds(diagnostics=samples)
    run.write("config.json", run.config() | {"suites": {"a": {"n": 1, "judge": None}, "b": {"n": 2}}})
    assert holds(suites={"a": {"n": 1, "judge": "classifier"}})
    assert not holds(suites={"a": {"n": 3, "judge": None}})
    before = (run.path / "config.json").read_bytes()
    asked.note({**plain, "suites": {"a": {"n": 1, "judge": "classifier"}}}, run)
    assert (run.path / "config.json").read_bytes() == before
