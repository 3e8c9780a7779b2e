"""Exact checkpoints of a training run in safetensors and JSON (Lightning's own are pickles)."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cwac_lab.core import distributed
from cwac_lab.core.cache import read_json, reading, write_json
from cwac_lab.core.errors import LabError
from cwac_lab.defenses.interface import Defense
from cwac_lab.models.shards import is_sharded, like, local
from cwac_lab.training.module import FineTuning

_SCRATCH = ".checkpoint-"


def _trainable(model: Any) -> dict[str, torch.nn.Parameter]:
    """Return what a run goes on with: what trains, and the factors beside it without which that means nothing."""
    named = model.named_parameters()
    return {name: parameter for name, parameter in named if parameter.requires_grad or ".lora_A." in name}


def save(folder: Path, module: FineTuning, identity: str) -> None:
    """Write weights, optimizer, schedule and the defence's state after a step; replaces an older checkpoint.

    Of a sharded model every process writes its rows, the first one all else. A save that fails leaves the older one.
    """
    lead = distributed.rank() == 0
    if lead:
        folder.parent.mkdir(parents=True, exist_ok=True)
        clear(folder)
    scratch = distributed.told(Path(tempfile.mkdtemp(dir=folder.parent, prefix=_SCRATCH)) if lead else folder)
    try:
        _write(scratch, module, identity)
        if lead:
            _replace(folder, scratch)
    finally:
        if lead:
            shutil.rmtree(scratch, ignore_errors=True)


def clear(folder: Path) -> None:
    """Remove what killed processes left of saves beside a checkpoint's folder; who calls has the run to itself."""
    for left in folder.parent.glob(f"{_SCRATCH}*"):
        shutil.rmtree(left, ignore_errors=True)


def _write(scratch: Path, module: FineTuning, identity: str) -> None:
    """Write this process's part of a checkpoint; the first one's is complete when all have written theirs."""
    lead, number = distributed.rank() == 0, f"{distributed.rank():05d}-of-{distributed.world():05d}"
    parameters = _trainable(module.model)
    moments = {
        f"{name}/{key}": value
        for name, p in parameters.items()
        for key, value in module.optimizer.state.get(p, {}).items()
    }
    for kind, values in (("weights", parameters), ("optimizer", moments)):
        mine = {name: local(v.detach()).contiguous() for name, v in values.items() if lead or is_sharded(v)}
        if mine:
            save_file(mine, scratch / f"{kind}-{number}.safetensors")
    distributed.wait()
    if not lead:
        return
    state = {key: value.contiguous() for key, value in module.defense.state_dict().items()}
    save_file(state, scratch / "defense.safetensors")
    schedule = {k: v for k, v in module.schedule.state_dict().items() if k != "lr_lambdas"}
    write_json(scratch / "state.json", {"identity": identity, "step": module.step, "schedule": schedule})


def _replace(folder: Path, scratch: Path) -> None:
    """Put a complete checkpoint in the place of an older one, of which one is there at any time."""
    old = folder.with_name(folder.name + ".old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    scratch.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _stored(folder: Path, kind: str) -> dict[str, Tensor]:
    """Return what the processes wrote, whole."""
    parts: dict[str, list[Tensor]] = {}
    with reading(folder):
        for file in sorted(folder.glob(f"{kind}-*.safetensors")):
            for name, value in load_file(file).items():
                parts.setdefault(name, []).append(value)
    return {name: torch.cat(found) if len(found) > 1 else found[0] for name, found in parts.items()}


def _candidates(folder: Path) -> list[Path]:
    """Return a checkpoint's folder and that of the one it was about to replace, those that are whole."""
    both = (folder, folder.with_name(folder.name + ".old"))
    return [each for each in both if (each / "state.json").is_file()]


def resumed(folder: Path) -> bool:
    """Tell whether a training may go on from a folder's checkpoint."""
    return bool(_candidates(folder))


class Resume:
    """A checkpoint on disk, applied in the order in which a run is built: weights, defence, optimizer."""

    def __init__(self, folder: Path) -> None:
        """Read the small part of a checkpoint."""
        with reading(folder):
            self.folder, state = folder, read_json(folder / "state.json")
            self.step, self._schedule, self.identity = int(state["step"]), state["schedule"], str(state["identity"])

    @staticmethod
    def find(folder: Path, identity: str) -> Resume | None:
        """Return the checkpoint in a folder, or the one it was about to replace.

        None where there is none, or where it was made with other settings or rows. What a killed process left of a
        save is removed.

        Raises:
            LabError: If it is damaged.
        """
        if distributed.rank() == 0:
            clear(folder)
        for candidate in _candidates(folder):
            if (found := Resume(candidate)).identity == identity:
                return found
        return None

    def weights(self, model: Any, defense: Defense) -> None:
        """Put back weights and the defence's state; the defence is already prepared on the start weights."""
        stored, wanted = _stored(self.folder, "weights"), _trainable(model)
        other = [name for name, each in wanted.items() if name not in stored or stored[name].shape != each.shape]
        if other:
            raise LabError(f"{self.folder} is of another model: {other[0]}; accepted: remove the folder to begin anew")
        with torch.no_grad():
            for name, parameter in wanted.items():
                parameter.copy_(stored[name])
        with reading(self.folder):
            state = load_file(self.folder / "defense.safetensors")
        defense.load_state_dict(state)

    def optimizer(self, model: Any) -> Any:
        """Return the function that fills a new optimizer and schedule."""

        def restore(optimizer: torch.optim.Optimizer, schedule: Any) -> None:
            parameters = _trainable(model)  # sharded by now, if they are to be
            moments: dict[str, dict[str, Tensor]] = {}
            for key, value in _stored(self.folder, "optimizer").items():
                name, _, field = key.rpartition("/")
                moments.setdefault(name, {})[field] = value
            for name, fields in moments.items():
                p = parameters[name]
                there = {k: v.to(p.device) for k, v in fields.items()}
                optimizer.state[p] = {k: like(p, v) if v.ndim else v for k, v in there.items()}
            # All groups have one rate, and a sharded model more groups than a whole one.
            fresh, rate = schedule.state_dict(), self._schedule["_last_lr"][0]
            rates = {"base_lrs": fresh["base_lrs"], "_last_lr": [rate] * len(optimizer.param_groups)}
            schedule.load_state_dict({**fresh, **self._schedule, **rates})
            for group in optimizer.param_groups:
                group["lr"] = rate

        return restore


class SafeCheckpoint(L.Callback):
    """Saves a checkpoint every n optimizer steps."""

    def __init__(self, folder: Path, every_n_steps: int, identity: str) -> None:
        """``identity`` is that of settings and rows."""
        self.folder, self.every, self.identity = folder, every_n_steps, identity

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save where a step of the optimizer has just ended on a multiple of n."""
        done = (batch_idx + 1) % module.config.accumulate == 0
        if done and module.step % self.every == 0:
            save(self.folder, module, self.identity)
