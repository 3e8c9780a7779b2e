"""Benign rows that pull a model where harmful rows do, by the direction of their gradients.

After He et al. 2024, "What is in Your Safe Data? Identifying Benign Data that Breaks Safety"; a variant: the gradients
are those of one matrix, the last layer's FFN output projection, so that a row costs about one forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from cwac_lab.core.progress import track
from cwac_lab.data.batches import collate
from cwac_lab.models.answers import answer_loss, to_device
from cwac_lab.models.chat import Encoded
from cwac_lab.models.sites import linears


def closeness(model: Any, rows: Sequence[Encoded], harmful: Sequence[Encoded], pad_id: int) -> Float[Tensor, " N"]:
    """Return the cosine of every row's gradient with the mean of the harmful rows' unit gradients, shape (N,).

    Args:
        model: The model at its start; it stays as it is.
        rows: N rows to compare.
        harmful: Rows whose gradients show the way.
        pad_id: Id to pad with.
    """
    *_, last = linears(model, "ffn_out")
    weight = last.parameter
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.requires_grad_(False)
    weight.requires_grad_(True)

    def direction(row: Encoded) -> Tensor:
        loss = answer_loss(model, to_device(collate([row], pad_id), model.device))
        (gradient,) = torch.autograd.grad(loss, weight)
        return normalize(gradient.float().flatten(), dim=0)

    try:
        total = torch.zeros(weight.numel(), device=weight.device)
        for row in harmful:
            total += direction(row)
        towards = normalize(total, dim=0)
        return torch.stack([direction(row) @ towards for row in track(rows, "taking gradients, rows")]).cpu()
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trains[name])


def closest(model: Any, rows: Sequence[Encoded], harmful: Sequence[Encoded], n: int, pad_id: int) -> list[int]:
    """Return the places of the n rows whose gradients are closest to the harmful ones, closest first."""
    return closeness(model, rows, harmful, pad_id).topk(n).indices.tolist()
