"""Logits and loss at the answer tokens of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, NotRequired, TypedDict, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from cwac_lab.models.chat import IGNORED
from cwac_lab.models.prefix import computed_alone, shared_length, states_after

T = TypeVar("T")


class Piece(NamedTuple):
    """What a batch is of an optimizer step's rows: part ``number`` of ``of``, one a device and accumulated forward.

    The loop averages over the pieces, so sums are divided by what a piece holds on average; then a step does not depend
    on how its rows were divided.

    Attributes:
        number: Which piece.
        of: Number of pieces.
        rows: Rows of the whole step.
        answers: Answer tokens of a piece on average; infinite for one that is only there to keep step.
        tokens: Real tokens of a piece on average, likewise.
    """

    number: int
    of: int
    rows: int
    answers: float
    tokens: float


class Batch(TypedDict):
    """Right-padded rows: ids, a mask that is 1 on real tokens, labels that are ``IGNORED`` on prompts; of shape (B, T).

    ``piece`` is there where a step's rows are divided.
    """

    input_ids: Int[Tensor, "B T"]
    attention_mask: Int[Tensor, "B T"]
    labels: Int[Tensor, "B T"]
    piece: NotRequired[Piece]


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return a batch with its tensors on a device."""
    moved: Batch = {**batch}
    for name in ("input_ids", "attention_mask", "labels"):
        moved[name] = batch[name].to(device)
    return moved


def mean_over_answers(values: Float[Tensor, " N"], batch: Batch) -> Float[Tensor, ""]:
    """Return the mean of values at a batch's answer tokens, or what a piece adds to that of its step, shape ()."""
    return values.sum() / batch["piece"].answers if "piece" in batch else values.mean()


def mean_over_tokens(values: Float[Tensor, " N"], batch: Batch) -> Float[Tensor, ""]:
    """Return the mean of values at a batch's real tokens, or what a piece adds to that of its step, shape ()."""
    return values.sum() / batch["piece"].tokens if "piece" in batch else values.mean()


def share(items: Sequence[T], batch: Batch) -> tuple[Sequence[T], float]:
    """Return which of a step's items fall to a piece, and what the mean over them counts in the step's (1 for all).

    A piece that has none gets the first at weight 0: every device takes the same forwards.
    """
    if "piece" not in batch:
        return items, 1.0
    number, of = batch["piece"][:2]
    mine = items[number::of]
    return mine or items[:1], of * len(mine) / len(items)


def answer_states(model: Any, batch: Batch) -> tuple[Float[Tensor, "N D"], Int[Tensor, " N"]]:
    """Return the last hidden states at the N positions that predict an answer token, and those tokens.

    The opening that all rows share is computed once.

    Args:
        model: A causal language model.
        batch: The rows.
    """
    ids, labels = batch["input_ids"], batch["labels"]
    first = int((labels != IGNORED).int().argmax(dim=1).min())  # the state before it is needed, so it is not shared
    shared = 0 if computed_alone(model) else shared_length(ids[:, :first].tolist(), first - 1)
    hidden = states_after(model, ids, batch["attention_mask"], shared)
    targets = labels[:, shared + 1 :]
    answers = targets != IGNORED
    return hidden[:, :-1][answers], targets[answers]


def logits_of(model: Any, states: Float[Tensor, "N D"], head: Any = None) -> Float[Tensor, "N V"]:
    """Return the logits of last hidden states, by the model's head or another of its kind.

    Granite divides what the head gives, Gemma 2 caps it.
    """
    logits: Tensor = (head or model.get_output_embeddings())(states)
    scaling = getattr(model.config, "logits_scaling", None)
    logits = logits if scaling is None else logits / scaling
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def answer_logits(model: Any, batch: Batch) -> tuple[Float[Tensor, "N V"], Int[Tensor, " N"]]:
    """Return logits at the N positions that predict an answer token, and those tokens.

    The head runs at these positions only: for short answers and a large vocabulary V that is most of its cost.

    Args:
        model: A causal language model.
        batch: The rows.
    """
    states, targets = answer_states(model, batch)
    return logits_of(model, states), targets


def answer_loss(model: Any, batch: Batch) -> Float[Tensor, ""]:
    """Return the mean cross-entropy over a batch's answer tokens, shape ()."""
    logits, targets = answer_logits(model, batch)
    return mean_over_answers(cross_entropy(logits.float(), targets, reduction="none"), batch)
