"""The Lightning module that calls a defence's hooks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from jaxtyping import Float
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from transformers import get_scheduler

from cwac_lab.defense import Defense
from cwac_lab.errors import in_range, one_of
from cwac_lab.models.answers import Batch, answer_loss
from cwac_lab.models.shards import is_sharded
from cwac_lab.training.sharding import Sharded, clip_grad_norm

PRECISIONS = ("32-true", "bf16-true", "bf16-mixed")
# Settings that change nothing of what is computed, but for rounding.
INCIDENTAL_TRAINER = ("progress_bar", "export", "checkpoint_every_n_steps", "gradient_checkpointing", "strategy")
STRATEGIES = ("ddp", "fsdp")
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")


@dataclass
class TrainerConfig:
    """The ``trainer`` group.

    Attributes:
        epochs: Passes over the mixture.
        batch_size: Rows per forward, of all devices together: a run does not depend on how many there are.
        accumulate: Forwards per optimizer step.
        learning_rate: Peak learning rate of AdamW.
        weight_decay: Decoupled weight decay, on matrices only.
        schedule: Learning-rate schedule, one of ``SCHEDULES``.
        warmup_share: Share of the steps with linear warm-up (not for ``constant``).
        gradient_clip: Largest gradient norm; 0 means no clipping.
        max_length: Tokens a conversation is cut to.
        precision: Lightning precision, one of ``PRECISIONS``.
        accelerator: Lightning accelerator (``cpu``, ``cuda``, ``auto``).
        devices: Number of devices of this machine, each with a process of its own.
        strategy: ``ddp``: every device holds the model; ``fsdp``: its weights, gradients and moments are sharded.
        gradient_checkpointing: Keep only each layer's input for the backward pass and compute the rest again: less
            memory, more time.
        checkpoint_every_n_steps: Optimizer steps between resumable checkpoints; 0 means none.
        export: Save the fine-tuned model into the run folder.
        progress_bar: Show Lightning's progress bar.
    """

    epochs: int = 1
    batch_size: int = 8
    accumulate: int = 1
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    schedule: str = "linear"
    warmup_share: float = 0.1
    gradient_clip: float = 1.0
    max_length: int = 512
    precision: str = "32-true"
    accelerator: str = "cpu"
    devices: int = 1
    strategy: str = "ddp"
    gradient_checkpointing: bool = False
    checkpoint_every_n_steps: int = 0
    export: bool = True
    progress_bar: bool = True

    def __post_init__(self) -> None:
        """Check the fields."""
        for key in ("epochs", "batch_size", "accumulate"):
            in_range(key, getattr(self, key), 1)
        in_range("devices", self.devices, 1)
        one_of("strategy", self.strategy, STRATEGIES)
        in_range("max_length", self.max_length, 16)
        in_range("learning_rate", self.learning_rate, 0, open_low=True)
        for key in ("weight_decay", "gradient_clip", "checkpoint_every_n_steps"):
            in_range(key, getattr(self, key), 0)
        in_range("warmup_share", self.warmup_share, 0, 1)
        one_of("schedule", self.schedule, SCHEDULES)
        one_of("precision", self.precision, PRECISIONS)
        one_of("accelerator", self.accelerator, ("auto", "cpu", "cuda", "mps"))

    @property
    def device(self) -> torch.device:
        """The device that models are prepared, trained and evaluated on."""
        if self.accelerator != "auto":
            return torch.device(self.accelerator)
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """The type that weights are loaded in."""
        return torch.bfloat16 if self.precision == "bf16-true" else torch.float32

    def autocast(self) -> torch.autocast:
        """Return a new context in which a forward computes as in training."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16-mixed")


class FineTuning(L.LightningModule):
    """Trains a causal language model under a defence."""

    def __init__(
        self, model: Any, defense: Defense, config: TrainerConfig, total_steps: int, first_step: int = 0,
        restore: Callable[[torch.optim.Optimizer, Any], None] | None = None,
    ) -> None:  # fmt: skip
        """Take a prepared defence; ``restore`` fills optimizer and schedule of a resumed run."""
        super().__init__()
        self.model, self.defense, self.config = model, defense, config
        self.total_steps, self.step, self._restore = total_steps, first_step, restore
        self._logged: dict[str, dict[str, float]] = {}
        self._micro: list[dict[str, Tensor]] = []
        self._sharded: Sharded | None = None
        self.optimizer: torch.optim.Optimizer
        self.schedule: Any

    def configure_model(self) -> None:
        """Shard the model, where the strategy asks for it."""
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and self._sharded is None:
            self._sharded = Sharded(self.model, self.trainer.strategy.device_mesh["data_parallel"])

    def teardown(self, stage: str) -> None:
        """Make a sharded model whole again."""
        if self._sharded is not None:
            self._sharded.undo()

    def _losses(self, batch: Batch) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        task = self.defense.task_loss(self.model, batch, self.step)
        if task is None:
            task = answer_loss(self.model, batch)
        return task, self.defense.loss_terms(self.model, batch, self.step)

    def training_step(self, batch: Batch, _: int) -> Float[Tensor, ""]:
        """Return the task loss plus the defence's terms, shape ()."""
        batch = self.defense.select_batch(self.step, batch)
        sharded = self._sharded
        task, terms = self._losses(batch) if sharded is None else sharded.root(self._losses, batch)
        self._micro.append({f"loss/{name}": term.detach() for name, term in {"task": task, **terms}.items()})
        return task + sum(terms.values()) if terms else task

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the defence change gradients (before clipping)."""
        if self._sharded is not None:
            self._sharded.average()
        self.defense.after_backward(self.step)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip by norm as Lightning does, which declines to in mixed precision where the optimizer is fused."""
        if gradient_clip_val:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            clip = torch.nn.utils.clip_grad_norm_ if self._sharded is None else clip_grad_norm
            clip(parameters, gradient_clip_val)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Step, then let the defence change weights."""
        optimizer.step(closure=optimizer_closure)
        self.defense.after_optimizer_step(self.step)
        losses = {name: torch.stack([each[name] for each in self._micro]).mean() for name in self._micro[0]}
        self._micro.clear()
        self.log("loss/task", losses.pop("loss/task"), prog_bar=True, sync_dist=self.trainer.world_size > 1)
        self.log_figures("loss", losses)
        self.log_figures("step", self.defense.step_metrics(self.step))
        self.step += 1

    def log_figures(self, when: str, values: dict[str, Any]) -> None:
        """Log figures; one that is absent on a step is NaN there, where Lightning would repeat its last value."""
        known = self._logged.setdefault(when, {})  # in one order in all processes, which average value by value
        known.update(dict.fromkeys(values, math.nan))
        self.log_dict({**known, **values}, sync_dist=self.trainer.world_size > 1)

    def configure_optimizers(self) -> dict[str, Any]:
        """Return AdamW over what is trainable (no decay on vectors) and its schedule."""
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        groups = []
        for sharded in (False, True):
            mine = [p for p in trainable if is_sharded(p) is sharded]
            groups += [
                {"params": [p for p in mine if p.ndim > 1], "weight_decay": self.config.weight_decay},
                {"params": [p for p in mine if p.ndim <= 1], "weight_decay": 0.0},
            ]
        groups = [group for group in groups if group["params"]]
        self.optimizer = torch.optim.AdamW(groups, lr=self.config.learning_rate, fused=True)
        warmup = int(self.config.warmup_share * self.total_steps)
        self.schedule = get_scheduler(self.config.schedule, self.optimizer, warmup, self.total_steps)
        if self._restore is not None:
            self._restore(self.optimizer, self.schedule)
        return {"optimizer": self.optimizer, "lr_scheduler": {"scheduler": self.schedule, "interval": "step"}}
