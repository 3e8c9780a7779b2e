"""L2 to the start (L2-SP, Li et al. 2018): a quadratic pull of every trained weight to where it was.

Fidelity: exact, ``L = CE + lambda ||theta - theta_0||^2``; with LoRA the distance is that of the weights,
``||alpha / r B A||_F^2``, not of the factors, which give the same weights in many ways. The control for every method
that limits how far weights move.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from cwac_lab.core import linalg
from cwac_lab.core.errors import in_range
from cwac_lab.defenses.interface import Context, Defense
from cwac_lab.models.adapters import has_adapters
from cwac_lab.models.answers import Batch
from cwac_lab.models.shards import is_sharded, local, rows, whole, with_local_gradient
from cwac_lab.models.sites import Matrix, linears


@dataclass
class L2(Defense):
    """Penalise the squared distance to the start weights.

    Attributes:
        strength: Weight of the squared distance, lambda; 0 switches it off.
    """

    strength: float = 1.0

    precedence: ClassVar[int] = 3

    def __post_init__(self) -> None:
        """Check the field."""
        in_range("strength", self.strength, 0)

    @property
    def copies(self) -> float:
        """The start."""
        return float(self.strength > 0)

    def prepare(self, context: Context) -> None:
        """Remember the start."""
        if not self.strength:
            return
        self._adapted = []
        if has_adapters(context.model):
            self._adapted = [linear for linear in linears(context.model, "all_linear") if linear.adapter is not None]
        self._start = {} if self._adapted else start_copy(context.model)

    def loss_terms(self, model: Any, batch: Batch, step: int) -> dict[str, Float[Tensor, ""]]:
        """Return the penalty, of shape ()."""
        if not self.strength:
            return {}
        distance = squared_update(self._adapted) if self._adapted else squared_distance(model, self._start)
        return {"l2": self.strength * distance}


def squared_update(adapted: list[Matrix]) -> Float[Tensor, ""]:
    """Return ``sum ||alpha / r B A||_F^2`` over the adapters, of shape ()."""
    pairs = [factors for linear in adapted if (factors := linear.factors()) is not None]
    with torch.autocast(pairs[0][0].device.type, enabled=False):
        return torch.stack([linalg.squared_norm_of_product(left.float(), right.float()) for left, right in pairs]).sum()


def start_copy(model: Any) -> dict[str, Tensor]:
    """Return copies of all trained weights by name, whole in every process."""
    return {name: whole(p.detach()).clone() for name, p in model.named_parameters() if p.requires_grad}


def squared_distance(model: Any, anchor: dict[str, Tensor]) -> Float[Tensor, ""]:
    """Return ``sum ||theta - anchor||^2`` over the weights that train now, of shape ()."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    squares: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, p in trained.items():
        squares[is_sharded(p)].append((local(p).float() - rows(p, anchor[name]).float()).square().sum())
    parts = {sharded: torch.stack(found).sum() for sharded, found in squares.items() if found}
    if True in parts:
        parts[True] = with_local_gradient(parts[True])
    return torch.stack(list(parts.values())).sum()
