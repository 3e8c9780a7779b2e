"""What the start model computes, while the model moves on: values kept from before training, or adapters turned off."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cwac_lab.core.errors import LabError
from cwac_lab.core.progress import track
from cwac_lab.data.batches import collate
from cwac_lab.models.adapters import has_adapters, without_adapters
from cwac_lab.models.answers import Batch, answer_states, logits_of, to_device
from cwac_lab.models.chat import IGNORED, Encoded

Row = tuple[tuple[int, ...], int]


def _keys(batch: Batch) -> list[Row]:
    """Return what tells the rows of a batch apart: their tokens, and how many of them are answer tokens."""
    lengths = batch["attention_mask"].sum(1).tolist()
    answers = answer_counts(batch["labels"]).tolist()
    ids = batch["input_ids"].tolist()
    return [(tuple(row[:length]), n) for row, length, n in zip(ids, lengths, answers, strict=True)]


def answer_counts(labels: Int[Tensor, "B T"]) -> Int[Tensor, " B"]:
    """Return how many answer tokens every row predicts."""
    return (labels[:, 1:] != IGNORED).sum(1)


class StartValues:
    """Values of the start model at the answer tokens of known rows, computed once: no second model is kept.

    They lie in the memory of the CPU, in every process of a run; N answer tokens take N times the size of a value.
    """

    @torch.no_grad()
    def __init__(
        self, compute: Callable[[Batch], Float[Tensor, "N ..."]], rows: Sequence[Encoded], pad_id: int,
        device: torch.device, batch_size: int = 16,
    ) -> None:  # fmt: skip
        """Compute the values of all rows.

        Args:
            compute: Returns the values at the N answer tokens of a batch, in the order of ``answer_logits``.
            rows: All rows that may be trained on; a row that occurs again is computed once.
            pad_id: Id to pad with.
            device: Where the model is.
            batch_size: Rows per forward.
        """
        self._values: dict[Row, Tensor] = {}
        ordered = sorted({(tuple(r.input_ids), tuple(r.labels)) for r in rows}, key=lambda row: len(row[0]))
        for begin in track(range(0, len(ordered), batch_size), "what the start says, batches"):
            part = [Encoded(list(ids), list(labels)) for ids, labels in ordered[begin : begin + batch_size]]
            batch = to_device(collate(part, pad_id), device)
            values = torch.split(compute(batch).cpu(), answer_counts(batch["labels"]).tolist())
            self._values.update(zip(_keys(batch), (value.clone() for value in values), strict=True))

    def known(self, batch: Batch) -> Bool[Tensor, " B"]:
        """Tell which rows of a batch are known."""
        return torch.tensor([key in self._values for key in _keys(batch)], device=batch["labels"].device)

    def of(self, batch: Batch, rows: Bool[Tensor, " B"] | None = None) -> Float[Tensor, "N ..."]:
        """Return the values at the N answer tokens of a batch of known rows.

        Args:
            batch: The batch.
            rows: Which of its rows are asked for; None stands for all.

        Raises:
            LabError: If one is not known: it was changed between the epochs.
        """
        keys = _keys(batch)
        if rows is not None:
            keys = [key for key, asked in zip(keys, rows.tolist(), strict=True) if asked]
        unknown = sum(key not in self._values for key in keys)
        if unknown:
            raise LabError(
                f"{unknown} of {len(keys)} rows were not asked of the start (accepted: rows that never change)"
            )
        return torch.cat([self._values[key] for key in keys]).to(batch["input_ids"].device)


class StartLogits:
    """The start model's logits at the answer tokens of known rows: its last hidden states, and its head.

    A head that trains is copied, with its V x D weights.
    """

    def __init__(self, model: Any, rows: Sequence[Encoded], pad_id: int) -> None:
        """Compute the states, on a model at its start that has been told what trains."""
        self._model, self._head = model, model.get_output_embeddings()
        if any(parameter.requires_grad for parameter in self._head.parameters()):
            self._head = copy.deepcopy(self._head).requires_grad_(False)
        self._states = StartValues(lambda batch: answer_states(model, batch)[0], rows, pad_id, model.device)

    def known(self, batch: Batch) -> Bool[Tensor, " B"]:
        """Tell which rows of a batch are known."""
        return self._states.known(batch)

    @torch.no_grad()
    def of(self, batch: Batch, rows: Bool[Tensor, " B"] | None = None) -> Float[Tensor, "N V"]:
        """Return the logits at the N answer tokens of a batch of known rows, or of those of its rows asked for."""
        return logits_of(self._model, self._states.of(batch, rows), self._head)


class StartModel:
    """Lets any input be seen as at the start: by the same network without its adapters, or by a copy of it."""

    def __init__(self, model: Any) -> None:
        """Take a model at its start, adapters attached; a model without any is copied."""
        self._adapted = has_adapters(model)
        self._model = model if self._adapted else copy.deepcopy(model).eval().requires_grad_(False)

    def model(self) -> AbstractContextManager[Any]:
        """Enter a context in which the model that it returns is the start, for forwards without gradients."""
        return without_adapters(self._model) if self._adapted else nullcontext(self._model)
