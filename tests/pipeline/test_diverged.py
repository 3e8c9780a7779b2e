"""Training that no longer computes numbers ends there: no model, no answers, a record that says so, valid JSON."""

import json
import math

import pytest
import torch

from cwac_lab import align, tables, train
from cwac_lab.core.cache import write_json
from cwac_lab.core.errors import ConfigError, Diverged, QualityError, in_range
from cwac_lab.defenses.cwac.sae.train import SAEConfig
from cwac_lab.defenses.cwac.sae.train import train as train_sae
from cwac_lab.defenses.interface import Composite, Defense
from cwac_lab.diagnostics.probe import Probe
from cwac_lab.report.console import Screen
from cwac_lab.report.grouping import records
from cwac_lab.results.store import runs
from cwac_lab.sweep import runner
from cwac_lab.sweep.cells import Cells
from cwac_lab.training import module
from cwac_lab.training.module import Watch
from support import tiny
from support.held import LORA
from support.held import train as trained

pytestmark = pytest.mark.slow

WILD = ("trainer.learning_rate=1e30", "trainer.gradient_clip=0", "trainer.schedule=constant", "trainer.epochs=2")


def ended(main, arguments, capsys, name="config"):
    """Return the one line of an entry point that ends with code 2, and what it printed."""
    with pytest.raises(SystemExit) as stopped:
        tiny.launch(main, arguments, name)
    assert stopped.value.code == 2
    told = capsys.readouterr()
    (line,) = [line for line in told.err.splitlines() if line.startswith("error: ")]
    return line.removeprefix("error: "), told.out


class Inf(Defense):
    """A term whose value, or whose gradient only, is infinite from a step on."""

    def __init__(self, step, *, gradient_only=False):
        self.step, self.gradient_only = step, gradient_only

    def loss_terms(self, model, batch, step):
        weight = model.get_input_embeddings().weight.sum()
        if step < self.step:
            return {"term": 0 * weight}
        if self.gradient_only:
            return {"term": (weight - weight.detach()).clamp_min(0).sqrt()}  # 0, and its slope is infinite
        return {"term": weight * math.inf}


# Defence, what is trained, settings, and how the line begins.
CASES = {
    "rate": (Defense(), {}, {"learning_rate": 1e30, "gradient_clip": 0.0}, "gradient of the loss", 1),
    "rate, clipped": (Defense(), {}, {"learning_rate": 1e30}, "gradient of the loss", 1),
    "adapters": (Defense(), {"tuning": LORA}, {"learning_rate": 1e30}, "loss", 1),
    "decay": (Defense(), {}, {"weight_decay": 1e30}, "gradient of the loss", 1),
    "term": (Inf(3), {}, {}, "loss", 3),
    "at once": (Inf(0), {}, {}, "loss", 0),
    "gradient": (Inf(2, gradient_only=True), {}, {}, "gradient of the loss", 2),
    "not clipped": (Inf(5, gradient_only=True), {}, {"gradient_clip": 0.0}, "gradient of the loss", 5),
    "accumulated": (Inf(1), {}, {"batch_size": 2, "accumulate": 2}, "loss", 1),
    "half": (Inf(1), {}, {"precision": "bf16-mixed"}, "loss", 1),
}


@pytest.mark.parametrize("case", CASES)
def test_training_ends_at_the_first_step_that_is_not_finite(case):
    defense, more, settings, what, step = CASES[case]
    settings = {"schedule": "constant", "batch_size": 4, "weight_decay": 0.0} | settings
    with pytest.raises(Diverged) as stopped:
        trained(defense, **more, **settings)
    since = f"step {step} of 6" + ("" if step else ", on the start as it is")
    assert str(stopped.value).startswith(f"{what} is not finite since {since} (trainer.learning_rate=")


@pytest.mark.parametrize("every", [1, 4, 50])
def test_an_accelerator_is_not_waited_for_at_every_step(every, monkeypatch):
    """Which step was the first is known all the same, whenever it is looked at."""
    looks = []

    class Elsewhere(Watch):
        def first(self):
            looks.append(len(self._seen))
            return super().first()

    monkeypatch.setattr(module, "Watch", Elsewhere)
    monkeypatch.setattr(module, "LOOK_EVERY", every)
    monkeypatch.setattr(module.FineTuning, "device", torch.device("meta"))
    with pytest.raises(Diverged, match="since step 3 of 6"):
        trained(Inf(3), batch_size=4)
    assert looks == {1: [1] * 4, 4: [4], 50: [6]}[every]


def test_a_training_that_is_well_ends_as_before():
    model, _ = trained(Defense(), gradient_clip=0.0)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_a_run_that_diverges_is_a_failed_one_without_model_and_answers(tiny_folder, tmp_path, capsys, monkeypatch):
    shared = [*tiny.small_run(tiny_folder, tmp_path), "constraint=none", "trainer.checkpoint_every_n_steps=1"]
    monkeypatch.setattr("cwac_lab.run.stages._evaluate", lambda *_: pytest.fail("answers were asked for"))
    line, _ = ended(train.main, [*shared, *WILD, "diagnostics.enabled=true", "diagnostics.every_n_steps=1"], capsys)
    assert "not finite" in line
    assert "trainer.learning_rate=1e+30" in line
    monkeypatch.undo()
    (folder,) = runs(tmp_path)
    assert {"model", "generations.jsonl", "metrics.json", "checkpoint"}.isdisjoint(
        p.name for p in folder.path.iterdir()
    )
    assert folder.status == "failed"
    assert folder.told()["reason"] == f"Diverged: {line}"
    (row,) = records([folder])
    assert "not finite" in row["failed"]
    tiny.launch(train.main, [*shared, "seed=1"])
    tiny.launch(tables.main, [f"output_root={tmp_path}"], "tables")
    assert "failed: Diverged: " in capsys.readouterr().out
    for file in tmp_path.rglob("*.json"):
        json.loads(file.read_text(), parse_constant=lambda name, file=file: pytest.fail(f"{name} in {file}"))


def test_what_it_had_of_an_earlier_run_is_not_taken_for_its_own(tiny_folder, tmp_path, capsys):
    """A repeated run that fails has no metrics any more that a reader would take."""
    shared = [*tiny.small_run(tiny_folder, tmp_path), "constraint=none"]
    tiny.launch(train.main, shared)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Composite, "loss_terms", lambda _, *given: Inf(1).loss_terms(*given))
        ended(train.main, [*shared, "force=true"], capsys)
    (row,) = records(runs(tmp_path))
    assert "not finite" in row["failed"]
    assert "harmful_score" not in row


def test_a_sweep_goes_on_with_the_next_run(tiny_folder, tmp_path):
    shared = (*tiny.small_run(tiny_folder, tmp_path), "constraint=none")
    found = list(runner.sweep([(*shared, *WILD), shared], 1, Screen(quiet=True), lambda _: None, Cells(tmp_path)))
    assert [outcome.status for outcome in found] == ["failed", "ok"]
    assert found[0].reason.startswith("Diverged: gradient of the loss is not finite since step 1 of 8")


def test_to_tuning_a_diverged_trial_is_as_bad_as_can_be(tiny_folder, tmp_path, capsys, monkeypatch):
    # Tiny models are broken as well.
    monkeypatch.setattr("cwac_lab.evaluation.objectives.tuning_error", lambda _: 250.0)
    shared = [*tiny.small_run(tiny_folder, tmp_path), "logger=csv", "constraint=none", "trainer.gradient_clip=0"]
    chosen = ["-m", "search=base", *shared, "trainer.schedule=constant", "trainer.learning_rate=choice(1e-4,1e30)"]
    with pytest.raises(SystemExit, match="2"):
        tiny.launch(train.main, chosen)
    assert capsys.readouterr().err.count(" is not finite since step ") == 1
    (results,) = (tmp_path / "sweeps").glob("*/optimization_results.yaml")
    assert "trainer.learning_rate: 0.0001\nbest_value: 250.0" in results.read_text()


def test_to_an_attacker_a_diverged_trial_is_as_bad_as_can_be(tiny_folder, tmp_path, capsys):
    shared = [*tiny.small_run(tiny_folder, tmp_path), "logger=csv", "constraint=none", "trainer.gradient_clip=0"]
    attack = ["-m", "search=attacker", *shared, "trainer.schedule=constant", "hydra.sweeper.n_trials=4"]
    with pytest.raises(SystemExit, match="2"):
        tiny.launch(train.main, [*attack, "hydra.sweeper.params={trainer.learning_rate:'choice(1e-4,1e30)'}"])
    assert " is not finite since step " in capsys.readouterr().err
    (results,) = (tmp_path / "sweeps").glob("*/optimization_results.yaml")
    best = results.read_text()
    assert "trainer.learning_rate: 0.0001\n" in best
    assert "best_value: -100.0\n" in best


def test_an_alignment_that_diverges_is_not_kept(tiny_folder, tmp_path, capsys):
    shared = [*tiny.small_run(tiny_folder, tmp_path), "constraint=none", "model.align=refusals"]
    line, _ = ended(align.main, [*shared, "align.learning_rate=1e30"], capsys)
    assert "not finite" in line
    assert "(align.learning_rate=1e+30" in line
    assert not list((tmp_path / "cache" / "aligned").glob("[!.]*"))


@pytest.mark.parametrize("change", [{"learning_rate": 1e30}, {"learning_rate": 1e30, "min_explained_variance": -1e9}])
def test_an_autoencoder_that_diverges_is_too_poor(change, tmp_path):
    config = SAEConfig(**({"n_latents": 32, "k": 4, "steps": 20, "batch_size": 32} | change))
    x = torch.randn(96, 16, generator=torch.Generator().manual_seed(0))
    with pytest.raises(QualityError, match=r"lower sae.learning_rate=1e\+30"):
        train_sae(x, x[:32], config, "model.layers.1", tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_json_without_numbers(value, tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"rate": [1.0, value]})
    assert not list(tmp_path.iterdir())


def test_a_model_without_numbers_has_no_drift(tiny_folder):
    from cwac_lab.models.chat import Encoded

    model = tiny.model()
    row = Encoded([5, 6, 7, 8, 9, 10], [-100, -100, -100, 8, 9, 10])
    probe = Probe(model, {"harmful": [row, row], "benign": [row, row]}, 0, dict(model.named_parameters()).__getitem__)
    moved = tiny.model()
    with torch.no_grad():
        moved.get_decoder().layers[1].mlp.down_proj.weight.fill_(math.nan)
    with pytest.raises(Diverged, match="no drift to measure"):
        probe.measure(moved)


@pytest.mark.parametrize(
    ("key", "value"),
    [("trainer.learning_rate", "inf"), ("trainer.gradient_clip", "inf"), ("trainer.gradient_clip", "nan"),
     ("trainer.weight_decay", "inf"), ("sae.min_explained_variance", "-inf"), ("sae.min_explained_variance", "nan"),
     ("harmful_ratio", "nan"), ("tuning.alpha", "inf"), ("constraint.weight.energy", "nan")],
)  # fmt: skip
def test_settings_are_finite(key, value, capsys):
    line, _ = ended(train.main, ["tuning=lora" if key == "tuning.alpha" else "tuning=full", f"{key}={value}"], capsys)
    assert line.startswith(f"{key}=")
    assert "accepted: a" in line


def test_a_range_without_end_ends_before_infinity():
    with pytest.raises(ConfigError, match=r"a number in \[0, inf\)"):
        in_range("x", math.inf, 0)


def test_a_last_step_that_ruins_the_model_unseen_is_seen():
    """Whatever the optimizer does to the weights last, no loss is taken after it."""

    class Ruin(Defense):
        def prepare(self, context):
            self.model = context.model

        def after_optimizer_step(self, step):
            if step == 5:
                with torch.no_grad():
                    next(self.model.parameters()).fill_(math.nan)

    with pytest.raises(Diverged, match="loss is not finite after the last step"):
        trained(Ruin(), batch_size=4)
