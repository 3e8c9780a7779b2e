"""The callback that calls a defence's hooks on the steps of a trainer, and what is saved meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import TrainerCallback

from cwac_lab.core.errors import LabError
from cwac_lab.defenses.interface import Defense, overrides, settled
from cwac_lab.models import adapters
from cwac_lab.models.answers import Batch, Piece
from cwac_lab.models.chat import IGNORED, Encoded


class DefenseCallback(TrainerCallback):
    """Calls a prepared defence's hooks on the steps of a trainer, and adds its terms to the loss."""

    def __init__(self, trainer: Any, defense: Defense, model: Any) -> None:
        """Take a trainer, a prepared defence and the plain model inside the trainer's, before anything is trained."""
        self._trainer, self._defense, self._model = trainer, defense, model
        self._stage = "new"  # training, ended; saving is within training
        self._pieces: Iterator[Piece] = iter(())
        self._clip = trainer.args.max_grad_norm
        trainer.args.max_grad_norm = 0.0  # clipped below, after the defence has changed gradients
        self._task_loss: Callable[..., Any] = trainer.compute_loss
        self._collect: Callable[..., Any] = trainer.get_batch_samples
        self._save: Callable[..., Any] = trainer.save_model
        trainer.compute_loss, trainer.get_batch_samples = self.compute_loss, self.get_batch_samples
        trainer.save_model = self.save_model

    def get_batch_samples(self, *arguments: Any, **more: Any) -> Any:
        """Return the trainer's batches of the next step, and note what part of the step each of them is."""
        batches, counted = self._collect(*arguments, **more)
        self._pieces = iter(_pieces(batches))
        return batches, counted

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the trainer's loss (or the defence's in its place) plus the defence's terms, shape ()."""
        if not model.training:
            return self._task_loss(model, inputs, return_outputs, num_items_in_batch)
        step, shares = self._trainer.state.global_step, self._shares(num_items_in_batch)
        batch, piece = _batch(inputs), next(self._pieces, None)
        if piece is not None and piece.of > 1:
            batch["piece"] = piece
        batch, chosen = self._defense.select_batch(step, batch), inputs
        if batch["input_ids"] is not inputs["input_ids"]:  # other rows: what else the trainer knew of them is gone
            chosen = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
            if num_items_in_batch is not None:
                num_items_in_batch = _answers_of_step(batch)
        outputs = None
        loss: Float[Tensor, ""] | None = self._defense.task_loss(self._model, batch, step)
        if loss is not None:
            loss = loss / shares
        else:
            loss = self._task_loss(model, chosen, return_outputs, num_items_in_batch)
            if return_outputs:
                loss, outputs = loss
        for term in self._defense.loss_terms(self._model, batch, step).values():
            loss = loss + term / shares
        return (loss, outputs) if return_outputs else loss

    def _shares(self, num_items_in_batch: Any) -> int:
        """Return what the defence's losses are divided by, so that those of accumulated batches add up to their mean.

        It is 1 where the trainer divides the whole loss itself.
        """
        trainer = self._trainer
        summed = trainer.loss_is_scaled_for_ga
        if summed is None:
            counted = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
            summed = counted or trainer.compute_loss_func is not None
        return int(trainer.current_gradient_accumulation_steps) if summed else 1

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Tell the defence how many steps there are, and all rows.

        Raises:
            LabError: If the model is no longer at its start: the trainer goes on with a stopped run, or trains again.
        """
        stage, self._stage = self._stage, "ended"
        if state.global_step:
            raise LabError(f"protect: the run goes on at step {state.global_step} (accepted: a run from its start)")
        if stage != "new":
            raise LabError(
                "protect: train() once more, though the model has left the start that the defence holds on to "
                "(accepted: one train() with all epochs; else load the start anew, build a trainer, protect it)"
            )
        self._model.eval()
        self._defense.begin(state.max_steps, self._examples() if overrides(self._defense, "begin") else [])
        self._model.train()
        self._stage = "training"

    def _examples(self) -> list[Encoded]:
        """Return all rows that may be trained on, also those that an epoch leaves out; the order to come stays."""
        found, arguments = [], self._trainer.args
        whole, arguments.dataloader_drop_last = arguments.dataloader_drop_last, False
        try:
            with torch.random.fork_rng():
                for inputs in self._trainer.get_train_dataloader():
                    batch = _batch(inputs)
                    for ids, labels, mask in zip(
                        batch["input_ids"], batch["labels"], batch["attention_mask"].bool(), strict=True
                    ):
                        found.append(Encoded(ids[mask].tolist(), labels[mask].tolist()))
        finally:
            arguments.dataloader_drop_last = whole
        return found

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Let the defence change gradients, then clip them."""
        self._defense.after_backward(state.global_step)
        if self._clip:
            torch.nn.utils.clip_grad_norm_([p for p in self._model.parameters() if p.requires_grad], self._clip)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Let the defence change weights."""
        self._defense.after_optimizer_step(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Let the defence change the trained model."""
        self._defense.after_training(self._model)
        self._stage = "ended"

    def save_model(self, *arguments: Any, **more: Any) -> None:
        """Save what would be kept if training ended now; it goes on with what there was, to the bit."""
        with self._settled():
            self._save(*arguments, **more)

    @contextmanager
    def _settled(self) -> Iterator[None]:
        """Enter a context in which the trained weights are those that are used."""
        if self._stage != "training":
            yield
            return
        self._stage = "saving"
        try:
            with settled(self._defense, self._model):
                yield
        finally:
            self._stage = "training"

    def merged(self) -> Any:
        """Return the plain model of a trained PEFT one, in float32; the trainer saves it from now on.

        Saved or merged in bfloat16, an update is rounded, and then leaks as rounding does.
        """
        if self._stage == "training":  # it was cut short
            self.on_train_end(None, None, None)
        self._stage = "ended"
        if hasattr(self._trainer.model, "peft_config"):
            self._trainer.model = self._trainer.model_wrapped = adapters.merge(self._trainer.model.base_model)
        return self._trainer.model


def _batch(inputs: dict[str, Any]) -> Batch:
    """Return the rows of a trainer's batch; right-padded, with labels that are -100 on prompts."""
    mask = inputs.get("attention_mask")
    if mask is None:
        raise LabError("protect: the trainer's batches have no attention_mask (accepted: padded rows, packing=False)")
    if not mask[:, 0].all():
        raise LabError("protect: the trainer's batches are padded on the left (accepted: on the right)")
    return {"input_ids": inputs["input_ids"], "attention_mask": mask, "labels": inputs["labels"]}


def _pieces(batches: Sequence[dict[str, Any]]) -> list[Piece]:
    """Return what each of the batches that are accumulated in a step is of it."""
    step, of = [_batch(inputs) for inputs in batches], len(batches)
    rows = sum(len(batch["input_ids"]) for batch in step)
    answers = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in step)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in step)
    return [Piece(number, of, rows, answers / of, tokens / of) for number in range(of)]


def _answers_of_step(batch: Batch) -> float:
    """Return the answer tokens of all batches of a batch's step."""
    if "piece" in batch:
        return batch["piece"].answers * batch["piece"].of
    return float((batch["labels"][:, 1:] != IGNORED).sum())
