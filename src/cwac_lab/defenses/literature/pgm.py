"""MARS-PGM and l2-PGM (Gouk et al. 2021, arXiv 2002.08253): no weight moves further from the start than a radius.

After every optimizer step ``W <- W_0 + dW min(1, radius / ||dW||)``. The norm is that of a matrix (``frobenius``) or,
by itself, of each of its rows (``mars``: the sum of absolute values, whose maximum is the norm). It is the control for
whatever holds a model by moving it less, and says nothing of directions.

Fidelity: exact in rule and in the radius, which is one number for all layers, as in the released code (commit
00e5cce). Embeddings are taken by their rows, and a vector as a diagonal matrix. With LoRA it is ``alpha / r B A`` that
stays within the radius, by the rows of B.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from cwac_lab.core.errors import in_range, one_of
from cwac_lab.defenses.interface import Context, Defense
from cwac_lab.models.sites import Matrix, linears

NORMS = ("mars", "frobenius")


def shares_within(update: Float[Tensor, "m d"], radius: float, norm: str) -> Float[Tensor, "m 1"]:
    """Return what each row of an update is multiplied by so that the update is within the radius; at most 1.

    Args:
        update: dW.
        radius: The largest norm.
        norm: One of ``NORMS``.
    """
    rows = update.float().abs().sum(1, keepdim=True)
    if norm == "frobenius":
        rows = update.float().norm().expand(len(update), 1)
    return (radius / rows.clamp_min(torch.finfo(torch.float32).tiny)).clamp_max(1.0)


@dataclass
class _Free:
    """A matrix that trains itself, as (m, d), and where it started."""

    weight: Float[Tensor, "m d"]
    start: Float[Tensor, "m d"]

    def update(self) -> Float[Tensor, "m d"]:
        return self.weight.float() - self.start

    def scale(self, shares: Float[Tensor, "m 1"]) -> None:
        self.weight.copy_(self.start + shares * self.update())


@dataclass
class _Adapted:
    """A matrix with the factors of an adapter beside it, and a reader of where it started."""

    linear: Matrix
    start: Callable[[], Float[Tensor, "m d"]]

    def update(self) -> Float[Tensor, "m d"]:
        return self.linear.update(self.start)

    def scale(self, shares: Float[Tensor, "m 1"]) -> None:
        if (left := self.linear.left) is not None:
            left.mul_(shares)


def _found(context: Context) -> Iterator[_Free | _Adapted]:
    """Yield all that trains, matrix by matrix."""
    seen = set()
    for linear in linears(context.model, "all_linear"):
        if linear.adapter is not None:
            yield _Adapted(linear, lambda linear=linear: linear.of(context.start_weight(linear.name)))  # type: ignore[misc]
        elif linear.parameter.requires_grad:
            seen.add(id(linear.parameter))
            yield _Free(linear.weight, linear.weight.detach().to(torch.float32, copy=True))
    for name, parameter in context.model.named_parameters():
        if parameter.requires_grad and id(parameter) not in seen and ".lora_" not in name:
            weight = parameter.view(len(parameter), -1)
            yield _Free(weight, weight.detach().to(torch.float32, copy=True))


@dataclass
class PGM(Defense):
    """Keep every weight within a radius of the start.

    Attributes:
        radius: The largest norm of an update, in the units of the weights; null switches it off.
        norm: One of ``NORMS``.
    """

    radius: float | None = 0.3
    norm: str = "mars"

    precedence: ClassVar[int] = 1

    def __post_init__(self) -> None:
        """Check the fields."""
        if self.radius is not None:
            in_range("radius", self.radius, 0)
        one_of("norm", self.norm, NORMS)
        self._held: list[_Free | _Adapted] = []

    @property
    def copies(self) -> int:
        """The start."""
        return int(self.radius is not None)

    @property
    def shardable(self) -> bool:
        """Weights are taken whole."""
        return False

    @property
    def settles_factors(self) -> bool:
        """What is put in the place of factors has to be within the radius before they are merged."""
        return self.radius is not None

    def prepare(self, context: Context) -> None:
        """Remember the start."""
        self._held = [] if self.radius is None else list(_found(context))

    def after_optimizer_step(self, step: int) -> None:
        """Take what moved too far back to the radius."""
        self._shorten()

    def settle(self, model: Any) -> None:
        """Do so with what another part has put in the place of the weights."""
        self._shorten()

    @torch.no_grad()
    def _shorten(self) -> None:
        for held in self._held:
            shares = shares_within(held.update(), float(self.radius or 0), self.norm)
            if bool((shares < 1).any()):
                held.scale(shares)

    @torch.no_grad()
    def summary(self) -> dict[str, Any]:
        """Return the share of rows that ended at the radius, within a thousandth."""
        radius = 0.999 * float(self.radius or 0)
        ended = [shares_within(held.update(), radius, self.norm) < 1 for held in self._held]
        return {"pgm_share_at_radius": float(torch.cat(ended).float().mean())} if ended else {}
