"""Checkpoints of a training run: what a save that fails or is killed leaves."""

from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError

from cwac_lab.training import checkpoint
from cwac_lab.training.checkpoint import Resume, save
from support import tiny


@pytest.fixture
def module():
    """What a checkpoint is written of, after a step."""
    model = tiny.model()
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    defense = SimpleNamespace(state_dict=lambda: {"seen": torch.ones(2)})
    return SimpleNamespace(model=model, optimizer=optimizer, schedule=schedule, defense=defense, step=1)


def fail(error, at):
    """Return a function that raises when it is called for the given time, and before writes a part of a file."""
    calls = []

    def write(values, path):
        path.write_text("part")
        calls.append(path)
        if len(calls) == at:
            raise error

    return write


FAILURES = [
    ("save_file", SafetensorError("I/O error: No space left on device (os error 28)"), 1),
    ("save_file", OSError(28, "No space left on device"), 2),
    ("save_file", KeyboardInterrupt(), 3),
    ("write_json", OSError(28, "No space left on device"), 1),
]


@pytest.mark.parametrize(("name", "error", "at"), FAILURES)
@pytest.mark.parametrize("before", [True, False])
def test_a_save_that_fails_leaves_what_was_there(name, error, at, before, module, tmp_path, monkeypatch):
    folder = tmp_path / "checkpoint"
    if before:
        save(folder, module, "mine")
    there = sorted(tmp_path.rglob("*"))
    module.step = 2
    with monkeypatch.context() as patch:
        write = fail(error, at)
        patch.setattr(checkpoint, name, write if name == "save_file" else lambda path, values: write(values, path))
        with pytest.raises(type(error)):
            save(folder, module, "mine")
    assert sorted(tmp_path.rglob("*")) == there
    found = Resume.find(folder, "mine")
    assert (found.step if found else None) == (1 if before else None)
    save(folder, module, "mine")
    assert Resume.find(folder, "mine").step == 2


@pytest.mark.parametrize("meet", [lambda folder, module: Resume.find(folder, "mine"), lambda *of: save(*of, "mine")])
def test_what_a_killed_save_left_is_removed(meet, module, tmp_path):
    folder = tmp_path / "run" / "checkpoint"
    save(folder, module, "mine")
    for name in (".checkpoint-abc", ".checkpoint-def"):
        (folder.parent / name).mkdir()
        (folder.parent / name / "weights-00000-of-00001.safetensors").write_text("half")
    (folder.parent / ".other").mkdir()
    meet(folder, module)
    assert sorted(path.name for path in folder.parent.iterdir()) == [".other", "checkpoint"]
    assert Resume.find(folder, "mine").step == 1


def test_the_checkpoint_that_was_about_to_be_replaced_is_found(module, tmp_path):
    folder = tmp_path / "checkpoint"
    save(folder, module, "mine")
    folder.rename(tmp_path / "checkpoint.old")
    assert Resume.find(folder, "mine").step == 1
    assert Resume.find(folder, "another's") is None
