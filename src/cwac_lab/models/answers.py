"""Logits and loss at the answer tokens of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from cwac_lab.models.chat import IGNORED
from cwac_lab.models.prefix import shared_length, states_after

Batch = Mapping[str, Int[Tensor, "B T"]]


def answer_states(model: Any, batch: Batch) -> tuple[Float[Tensor, "N D"], Int[Tensor, " N"]]:
    """Return the last hidden states at the N positions that predict an answer token, and those tokens.

    The opening that all rows share is computed once.

    Args:
        model: A causal language model.
        batch: ``input_ids``, ``attention_mask`` and ``labels`` of shape (B, T); labels are ``IGNORED`` on prompts.
    """
    ids, labels = batch["input_ids"], batch["labels"]
    first = int((labels != IGNORED).int().argmax(dim=1).min())  # the state before it is needed, so it is not shared
    checkpointing = model.is_gradient_checkpointing and model.training  # drops the keys and values of an opening
    shared = 0 if checkpointing else shared_length(ids[:, :first].tolist(), first - 1)
    hidden = states_after(model, ids, batch["attention_mask"], shared)
    targets = labels[:, shared + 1 :]
    answers = targets != IGNORED
    return hidden[:, :-1][answers], targets[answers]


def logits_of(model: Any, states: Float[Tensor, "N D"], head: Any = None) -> Float[Tensor, "N V"]:
    """Return the logits of last hidden states, by the model's head or another of its kind."""
    logits: Tensor = (head or model.get_output_embeddings())(states)
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def answer_logits(model: Any, batch: Batch) -> tuple[Float[Tensor, "N V"], Int[Tensor, " N"]]:
    """Return logits at the N positions that predict an answer token, and those tokens.

    The head runs at these positions only: for short answers and a large vocabulary V that is most of its cost.

    Args:
        model: A causal language model.
        batch: As for ``answer_states``.
    """
    states, targets = answer_states(model, batch)
    return logits_of(model, states), targets


def answer_loss(model: Any, batch: Batch) -> Float[Tensor, ""]:
    """Return the mean cross-entropy over a batch's answer tokens, shape ()."""
    logits, targets = answer_logits(model, batch)
    return cross_entropy(logits.float(), targets)
