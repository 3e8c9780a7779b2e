"""The Lightning module that calls a defence's hooks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
from jaxtyping import Float
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.utils.data import DataLoader

from cwac_lab.core import distributed
from cwac_lab.core.errors import Diverged
from cwac_lab.data.batches import collate, plan_batches
from cwac_lab.defenses.interface import Defense
from cwac_lab.models.answers import Batch, answer_loss
from cwac_lab.models.chat import Encoded
from cwac_lab.models.shards import is_sharded
from cwac_lab.training import rates
from cwac_lab.training.settings import TrainerConfig
from cwac_lab.training.sharding import Sharded, clip_grad_norm

# Steps between two looks at an accelerator, which would have to wait at each.
LOOK_EVERY = 8


class Watch:
    """Remembers, on the device, what was not finite of the steps."""

    def __init__(self) -> None:
        """Start without any."""
        self._seen: list[tuple[int, Float[Tensor, " 2"]]] = []

    def note(self, step: int, loss: Float[Tensor, ""], norm: Float[Tensor, ""], *, together: bool) -> None:
        """Take loss and gradient norm of a step; ``together`` shares them with the processes that train along."""
        figures = torch.stack([loss.detach().float(), norm.float()])
        zeros = figures * 0  # NaN where a figure is not finite
        self._seen.append((step, distributed.summed(zeros) if together else zeros))

    def first(self) -> tuple[int, str] | None:
        """Return the first step since the last call that was not finite, and what of it; waits for the device."""
        told = [step for step, _ in self._seen]
        sums = torch.stack([zeros for _, zeros in self._seen]).tolist() if told else []
        self._seen.clear()
        for step, (loss, norm) in zip(told, sums, strict=True):
            if math.isnan(loss) or math.isnan(norm):
                return step, "loss" if math.isnan(loss) else "gradient of the loss"
        return None


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
        self._watch = Watch()
        self._norm: Float[Tensor, ""]
        # What takes the place of the rows of a step, for callbacks to set.
        self.rows: Callable[[int, Batch], Batch] = lambda step, batch: batch
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
        batch = self.defense.select_batch(self.step, self.rows(self.step, batch))
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
        """Clip by norm as Lightning does, which declines to in mixed precision where the optimizer is fused.

        The norm before is remembered, clipped or not.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if self._sharded is not None:
            self._norm = clip_grad_norm(parameters, gradient_clip_val or math.inf)
        elif gradient_clip_val:
            self._norm = torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val)
        else:
            self._norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Step, then let the defence change weights.

        Raises:
            Diverged: If loss or gradients of a step are not finite; on an accelerator of one of the last steps.
        """
        optimizer.step(closure=optimizer_closure)
        losses = {name: torch.stack([each[name] for each in self._micro]).mean() for name in self._micro[0]}
        self._micro.clear()
        self._watch.note(
            self.step, torch.stack(list(losses.values())).sum(), self._norm, together=self.trainer.world_size > 1
        )
        if self.device.type == "cpu" or (self.step + 1) % LOOK_EVERY == 0:
            self.look()
        self.defense.after_optimizer_step(self.step)
        self.log("loss/task", losses.pop("loss/task"), prog_bar=True, sync_dist=self.trainer.world_size > 1)
        self.log_figures("loss", losses)
        self.log_figures("step", self.defense.step_metrics(self.step))
        self.step += 1

    def look(self) -> None:
        """Look whether every step so far was finite.

        Raises:
            Diverged: If one was not.
        """
        found = self._watch.first()
        if found is not None:
            step, what = found
            untrained = "" if step else ", on the start as it is"
            raise Diverged(f"{what} is not finite since step {step} of {self.total_steps}{untrained}")

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
        self.schedule = rates.schedule(self.config, self.optimizer, self.total_steps)
        if self._restore is not None:
            self._restore(self.optimizer, self.schedule)
        return {"optimizer": self.optimizer, "lr_scheduler": {"scheduler": self.schedule, "interval": "step"}}


class TrainData(L.LightningDataModule):
    """Serves a fixed plan of steps from a given one on, so that a resumed run sees exactly the rows left.

    The rows of a step do not depend on how many devices and accumulated forwards they are divided among.
    """

    def __init__(
        self, examples: Sequence[Encoded], pad_id: int, batch_size: int, epochs: int, seed: int, first_step: int = 0,
        accumulate: int = 1,
    ) -> None:  # fmt: skip
        """Plan all epochs, ``batch_size * accumulate`` rows a step; ``first_step`` steps are skipped."""
        super().__init__()
        self.examples, self.pad_id, self.accumulate = examples, pad_id, accumulate
        self.plan = plan_batches([len(e.input_ids) for e in examples], batch_size * accumulate, epochs, seed)
        self.first_step = first_step

    def answer_tokens(self, steps: int) -> int:
        """Return the answer tokens that the first steps learn; a row counts as often as it is in them."""
        learned = [sum(label >= 0 for label in example.labels) for example in self.examples]
        return sum(learned[row] for rows in self.plan[:steps] for row in rows)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the loader over this process's pieces of the steps that are left."""
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
        of = self.accumulate * world
        pieces = [(rows, index) for rows in self.plan[self.first_step :] for index in range(rank, of, world)]

        def batch(piece: tuple[list[int], int]) -> Batch:
            rows, index = piece
            return collate([self.examples[row] for row in rows], self.pad_id, index, of)

        return DataLoader(pieces, batch_size=None, collate_fn=batch)  # type: ignore[arg-type]
