"""The alignment matrix of SafeLoRA and AsFT: ``C = V V^T / ||V||_F`` with ``V = W_aligned - W_base`` per layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cwac_lab.core import linalg
from cwac_lab.core.errors import LabError
from cwac_lab.defenses.interface import Context
from cwac_lab.models.adapters import held_weight
from cwac_lab.models.sites import Matrix, linears


@dataclass
class Directed:
    """A linear layer, its weight at the start (m, d), and C of shape (m, m)."""

    linear: Matrix
    start: Float[Tensor, "m d"]
    matrix: Float[Tensor, "m m"]

    @property
    def update(self) -> Float[Tensor, "m d"]:
        """Return how far the weight has moved, ``W - W_0``."""
        return self.linear.update(lambda: self.start)

    def outside(self) -> Float[Tensor, ""]:
        """Return ``||(I - C) dW||_F^2`` of shape (); with factors without forming the update."""
        factors = self.linear.factors()
        if factors is None:
            return (self.update - self.matrix @ self.update).square().sum()
        left, right = (factor.float() for factor in factors)
        return linalg.squared_norm_of_product(left - self.matrix @ left, right)


def directed(context: Context, modules: str, mode: str, rank: int | None) -> Iterator[Directed]:
    """Yield the layers of a scope with their C.

    Args:
        context: Start model, and the base weights before alignment.
        modules: Scope of linear layers.
        mode: ``as_released``: ``V V^T / ||V||_F``, which is no projector; ``exact``: the projector on the leading
            ``rank`` left singular directions of V (on all of them it is the identity for a V of full rank).
        rank: Number of directions of ``exact``.

    Raises:
        LabError: If a layer did not change in alignment, so that it has no direction.
    """
    assert context.base_weight is not None
    for linear in linears(context.model, modules):
        if linear.site.expert is not None:
            raise LabError(f"modules={modules}: {linear.name} holds experts, which have no alignment direction here")
        start = held_weight(linear)
        # As stored, not as held: in few bits, the rounding would be larger than what alignment did.
        readers = (context.start_weight, context.base_weight)
        aligned, before = (linear.of(read(linear.name)).to(start) for read in readers)
        direction = aligned - before
        if not direction.any():
            raise LabError(f"{linear.name} is the same before and after alignment: it has no alignment direction")
        if mode == "exact":
            left = torch.linalg.svd(direction, full_matrices=False).U[:, :rank]
            matrix = left @ left.T
        else:
            matrix = direction @ direction.T / direction.norm()
        yield Directed(linear, start, matrix)
