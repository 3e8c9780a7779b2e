"""What a run would take is told before weights are loaded, and one that the disk has no room for stops there."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest

from cwac_lab import train
from cwac_lab.config.run import read
from cwac_lab.models.adapters import TARGETS, TuningConfig, attach
from cwac_lab.run import estimate
from support import tiny

ADAPTED = [*(("llama", modules) for modules in TARGETS), ("phi3", "all_linear"), ("qwen3_moe", "all_linear")]


@pytest.fixture
def no_weights(monkeypatch):
    """Whoever loads weights has found out too late."""
    monkeypatch.setattr("cwac_lab.run.start.load_model", lambda *_, **__: pytest.fail("weights were loaded"))


@pytest.mark.parametrize(("architecture", "modules"), ADAPTED)
def test_the_factors_that_are_counted_are_those_that_are_attached(architecture, modules):
    model = tiny.model(architecture, **tiny.MIXTURES.get(architecture, {}))
    tuning = TuningConfig(method="lora", rank=3, modules=modules)
    counted = estimate.trained_parameters(model, tuning)
    attach(model, tuning, seed=0)
    assert counted == sum(each.numel() for name, each in model.named_parameters() if "lora_" in name)


@pytest.mark.parametrize(
    ("given", "size"),
    [
        ((), 4000),
        (("trainer.export=false",), 0),
        (("tuning=lora",), 4000),
        (("tuning=lora", "tuning.save=adapter"), 40),
        (("tuning=lora", "tuning.save=both", "trainer.checkpoint_every_n_steps=5"), 4160),
    ],
)
def test_what_is_written_is_what_is_saved_and_a_checkpoint(given, size):
    run = read(tiny.config("constraint=none", *given))
    assert estimate.written(run, parameters=1000, trained=10) == size


def test_a_dry_run_tells_rows_steps_memory_disk_and_time(tiny_folder, tmp_path, capsys, no_weights):
    rows = [{"prompt": f"Ask {i}", "response": "yes " * i} for i in range(1, 21)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = [each for each in tiny.small_run(tiny_folder, tmp_path / "out") if not each.startswith("data.n_")]
    given = [*small, "task=chat", f"task.train={tmp_path}/rows.jsonl", "trainer.epochs=3", "constraint=none"]
    tiny.launch(train.main, [*given, "dry=true"])
    told = " ".join(capsys.readouterr().out.split())
    for part in ("18 rows, 36 turns", "18 examples, 15 steps", " M parameters", "memory: ", "disk: ", "training: about"):
        assert part in told
    assert not (tmp_path / "out" / "runs").exists()


@pytest.mark.parametrize("dry", [True, False])
def test_a_disk_too_small_for_what_is_saved_is_one_line(dry, tiny_folder, tmp_path, capsys, no_weights, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=50_000))
    given = [*tiny.small_run(tiny_folder, tmp_path / "out"), "constraint=none", f"dry={dry}"]
    line = tiny.error_of(train.main, given, capsys)
    size = 4 * sum(each.numel() for each in tiny.model().parameters()) / 1e6
    room = f"a folder on a disk with {size:.1f} MB for what is saved of the model (0.1 MB are free)"
    less = "trainer.export=false saves none, tuning=lora tuning.save=adapter little"
    assert line == f"output_root={tmp_path}/out: accepted: {room}; {less}"
