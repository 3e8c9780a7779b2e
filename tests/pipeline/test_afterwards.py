"""What is asked of a finished run that its record lacks: made from what is there, or told, with an error code."""

import shutil
from dataclasses import fields

import pytest
from omegaconf import OmegaConf

from cwac_lab import train
from cwac_lab.config.run import INCIDENTAL
from cwac_lab.core.cache import read_json
from cwac_lab.judges.endpoint import EndpointConfig
from cwac_lab.results.store import RunFolder, flat, runs
from cwac_lab.run import stages
from support import tiny

pytestmark = pytest.mark.slow

SHARED = ("constraint=weight", "trainer.epochs=2", "trainer.learning_rate=1e-3", tiny.BOTH_JUDGES)
DRIFT = "diagnostics.enabled=true"
# What may be asked for without another key; each is tried below, that of general ability in test_ability.py, or nothing
# is made of it after training.
ASKED = {"diagnostics.enabled", "diagnostics.every_n_steps", "diagnostics.n_prompts", "evaluation.judges"}
ASKED |= {"evaluation.every_n_steps", "evaluation.watched", "evaluation.words_rates"}
ASKED |= {"trainer.export", "logger.wandb", "export.push", "export.private"}
ASKED |= {f"evaluation.{name}" for name in ("perplexity", "plain_text", "lm_eval", "lm_eval_limit", "lm_eval_tasks")}
ASKED |= {f"evaluation.endpoint.{each.name}" for each in fields(EndpointConfig)}
NOTHING = {
    *("logger.project", "output_root", "cache_root", "force", "data.root", "model.path", "trainer.accelerator"),
    *("dry", "objective", "data.max_line", "model.adapter", "model.revision", "model.base"),
    *("align.export", "align.rebuild"),
    *("trainer.progress_bar", "trainer.checkpoint_every_n_steps", "trainer.gradient_checkpointing", "trainer.strategy"),
}


@pytest.fixture(scope="module")
def store(tiny_folder, tmp_path_factory):
    """A store of three runs: with a model, with a model and drift, and with neither."""
    where = tmp_path_factory.mktemp("store")
    shared = [*tiny.small_run(tiny_folder, where), *SHARED]
    tiny.launch(train.main, [*shared, "seed=0"])
    tiny.launch(train.main, [*shared, "seed=1", DRIFT, "diagnostics.every_n_steps=4"])
    tiny.launch(train.main, [*shared, "seed=2", "trainer.export=false"])
    return where


@pytest.fixture
def again(store, tiny_folder, tmp_path, monkeypatch):
    """Ask for a run of a copy of the store again; training is a mistake."""
    shutil.copytree(store, tmp_path / "store")
    monkeypatch.setattr(stages, "carry_through", lambda *_: pytest.fail("it was carried out"))
    shared = [*tiny.small_run(tiny_folder, tmp_path / "store"), *SHARED]

    def ask(seed, *asked):
        tiny.launch(train.main, [*shared, f"seed={seed}", *asked])
        return next(run for run in runs(tmp_path / "store") if f"-s{seed}-" in run.path.name)

    return ask


def told(capsys, ask, *asked):
    """Return the line of a run that is asked for in vain."""
    with pytest.raises(SystemExit) as stopped:
        ask(*asked)
    assert stopped.value.code == 2
    found = capsys.readouterr()
    assert "already done" in found.out
    assert "harmful score" in found.out  # its result is shown all the same
    (line,) = found.err.strip().splitlines()
    return line


def test_every_setting_that_is_in_no_key_is_accounted_for():
    resolved = OmegaConf.to_container(tiny.config(), resolve=True)
    incidental = {
        key for key in flat(resolved) if any(key == path or key.startswith(f"{path}.") for path in INCIDENTAL)
    }
    assert incidental == ASKED | NOTHING


def test_a_run_that_was_not_asked_behind_words_of_rows_says_so(again, capsys):
    config = again(0).path / "config.json"  # it was: nothing is lacking
    config.write_text(config.read_text().replace('"words_rates": true', '"words_rates": false'))
    capsys.readouterr()
    assert "has no rates behind words that rows begin with (evaluation.words_rates=true)" in told(capsys, again, 0)


def test_a_model_that_was_not_kept_is_told(again, capsys):
    line = told(capsys, again, 2, "trainer.export=true")
    assert line.startswith("error: already done, but ")
    assert line.endswith(" has no model/ (trainer.export=true): force=true repeats the run")
    again(2, "trainer.export=false")
    again(0, "trainer.export=true")
    assert capsys.readouterr().err == ""


def test_a_run_that_is_repeated_without_a_model_keeps_none_of_before(store, tiny_folder, tmp_path):
    shutil.copytree(store, tmp_path / "store")
    shared = [*tiny.small_run(tiny_folder, tmp_path / "store"), *SHARED, "seed=0", "force=true"]
    tiny.launch(train.main, [*shared, "trainer.export=false"])
    (run,) = (run for run in runs(tmp_path / "store") if "-s0-" in run.path.name)
    assert not run.has("model")


def test_drift_of_a_saved_model_is_made_as_it_would_have_been(again):
    run = again(0, DRIFT, "diagnostics.n_prompts=3")
    assert run.status == "ok"
    found = read_json(run.path / "drift.json")
    assert found["prompts"] == {"harmful": 3, "benign": 3}
    assert list(found["measured_in"]) == ["subspace"]
    measured = again(1)  # within; afterwards it comes to the same
    within = read_json(measured.path / "drift.json")
    (measured.path / "drift.json").unlink()
    after = read_json(again(1, DRIFT).path / "drift.json")
    for kind in ("harmful", "benign"):
        after["summary"][kind].pop("bound")
        assert after["summary"][kind] == pytest.approx(within["summary"][kind], rel=1e-4, abs=1e-6)


def test_drift_without_a_model_is_told(again, capsys):
    line = told(capsys, again, 2, DRIFT, "trainer.export=false")
    assert "has no drift.json (diagnostics.enabled=true) nor a model to measure: force=true repeats the run" in line
    line = told(capsys, again, 2, DRIFT)
    assert "no model/ (trainer.export=true) and no drift.json" in line


@pytest.mark.parametrize(("seed", "every"), [(0, 4), (1, 2)])
def test_samples_are_taken_while_a_model_is_trained(seed, every, again, capsys):
    """And those of other steps are not those that are asked for; what can be made is made first."""
    line = told(capsys, again, seed, DRIFT, f"diagnostics.every_n_steps={every}")
    assert f"has no drift_samples.json of every {every} steps, which is taken while a model is trained" in line
    assert (again(seed).path / "drift.json").is_file()


def test_samples_and_drift_that_are_there_are_there(again, capsys):
    before = read_json(again(1).path / "drift.json")
    run = again(1, DRIFT, "diagnostics.every_n_steps=4")
    assert read_json(run.path / "drift.json") == before
    assert capsys.readouterr().err == ""


def test_drift_of_fewer_prompts_is_told_with_the_command(again, capsys):
    run = again(1, DRIFT, "diagnostics.n_prompts=2")
    out = " ".join(capsys.readouterr().out.split())
    command = f"python -m cwac_lab.diagnose run={run.path} n_prompts=2"
    assert f"drift.json is of 3 harmful and 3 benign prompts: {command}" in out


@pytest.mark.parametrize(
    ("judges", "said"),
    [("[classifier,refusal]", True), ("[refusal]", False), ("[classifier]", True), ("[refusal,beaver_dam]", True)],
)
def test_other_judges_are_told_with_the_command(judges, said, again, capsys, monkeypatch):
    monkeypatch.setattr("cwac_lab.judges.check", lambda *_: None)
    run = again(0, f"evaluation.judges={judges}")
    out = capsys.readouterr().out.replace("\n", "")
    command = f"judged by refusal and classifier: python -m cwac_lab.evaluate run={run.path} judges={judges}"
    assert (command in out) is said


def test_a_tracker_is_told_of_a_finished_run_once(again, capsys):
    run = again(0, "logger.wandb=offline")
    (tracked,) = (run.path / "wandb").glob("offline-run-*")
    assert "told to wandb, offline: rates and verdicts of the record" in " ".join(capsys.readouterr().out.split())
    log = (run.path / "log" / "metrics.csv").read_bytes()
    assert log.count(b"\n") > 1  # the curves that are there stay
    again(0, "logger.wandb=offline")
    assert list((run.path / "wandb").glob("offline-run-*")) == [tracked]
    assert "told to wandb" not in capsys.readouterr().out


def test_force_repeats_the_run(again, monkeypatch):
    carried_out = []
    monkeypatch.setattr(stages, "carry_through", lambda job: carried_out.append(job.folder))
    run = again(2, "force=true", "trainer.export=true")
    assert [each.path for each in carried_out] == [RunFolder(run.path).path]
