"""MARS-PGM and l2-PGM (Gouk et al. 2021, arXiv 2002.08253): no weight moves further from the start than a radius.

After every optimizer step ``dW <- dW min(1, radius / ||dW||)``. With ``norm=mars`` that is done row by row, and the
norm of a row is the sum of its absolute values. With ``frobenius`` it is done with a whole matrix. It is the control
for whatever holds a model by moving it less: it says nothing of directions.

Fidelity: variant. The rule, both norms and one radius for all layers are those of the released code (commit 00e5cce,
in Keras). There biases are free, scales of a norm layer are held one by one, over the root of the variance, under both
norms, and the new classifier is held around zero with a radius of its own. Here everything that trains is held around
the start: embeddings by rows, and vectors as diagonal matrices.
With LoRA it is ``alpha / r B A`` that stays within the radius, by the rows of B, until it is merged.

Beside the weight constraint it acts last, so both hold. Between two restorations what moved along V counts too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils import parametrize

from cwac_lab.core import linalg
from cwac_lab.core.errors import in_range, one_of
from cwac_lab.defenses.interface import Context, Defense, Requirements
from cwac_lab.models.sites import Matrix, linears

NORMS = ("mars", "frobenius")


def norms(update: Float[Tensor, "m d"], norm: str) -> Float[Tensor, "m 1"]:
    """Return the norm that counts for each row of an update dW; ``norm`` is one of ``NORMS``."""
    if norm == "frobenius":
        return update.norm().expand(len(update), 1)
    return update.abs().sum(1, keepdim=True)


@dataclass
class _Free:
    """What trains itself, a parameter or a matrix that lies in one, and where it started, as (m, d) in float32."""

    held: Matrix | torch.nn.Parameter
    start: Float[Tensor, "m d"]

    @classmethod
    def of(cls, held: Matrix | torch.nn.Parameter) -> _Free:
        return cls(held, cls._seen(held).detach().to(torch.float32, copy=True))

    @staticmethod
    def _seen(held: Matrix | torch.nn.Parameter) -> Float[Tensor, "m d"]:
        # A view that was kept would not follow its parameter to another device.
        return held.weight if isinstance(held, Matrix) else held.view(len(held), -1)

    def update(self) -> Float[Tensor, "m d"]:
        return self._seen(self.held).float() - self.start.to(self._seen(self.held).device)

    def scale(self, shares: Float[Tensor, "m 1"], update: Float[Tensor, "m d"]) -> None:
        weight = self._seen(self.held)
        weight.copy_(torch.where(shares < 1, self.start.to(weight.device) + shares * update, weight))


@dataclass
class _Adapted:
    """A matrix with the factors of an adapter beside it."""

    linear: Matrix

    def update(self) -> Float[Tensor, "m d"] | None:
        """Return ``alpha / r B A``, or None once it is merged."""
        factors = None if self.linear.left is None else self.linear.factors()
        return None if factors is None else linalg.product(factors[0].float(), factors[1].float())

    def scale(self, shares: Float[Tensor, "m 1"], update: Float[Tensor, "m d"]) -> None:
        assert self.linear.left is not None
        self.linear.left.mul_(shares)


def _found(model: Any) -> Iterator[_Free | _Adapted]:
    """Yield all that trains, matrix by matrix."""
    seen = set()
    for linear in linears(model, "all_linear"):
        if linear.adapter is not None:
            yield _Adapted(linear)
        elif linear.parameter.requires_grad:
            seen.add(id(linear.parameter))
            yield _Free.of(linear)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in seen and ".lora_" not in name:
            yield _Free.of(parameter)


@dataclass
class PGM(Defense):
    """Keep every weight within a radius of the start.

    Attributes:
        radius: The largest norm of an update, in the units of the weights; null switches it off.
        norm: ``mars``: the sum of absolute values, of each row; ``frobenius``: of a whole matrix.
    """

    radius: float | None = 0.3
    norm: str = "mars"

    precedence: ClassVar[int] = 4

    def __post_init__(self) -> None:
        """Check the fields."""
        if self.radius is not None:
            in_range("radius", self.radius, 0)
        one_of("norm", self.norm, NORMS)
        self._held: list[_Free | _Adapted] = []
        self._at_radius = 0.0

    @property
    def shardable(self) -> bool:
        """Weights are taken whole."""
        return False

    @property
    def copies(self) -> float:
        """The start."""
        return float(self.radius is not None)

    @property
    def bounds_update(self) -> bool:
        """By the radius."""
        return self.radius is not None

    @property
    def scales_rows(self) -> bool:
        """With ``mars`` each by itself."""
        return self.radius is not None and self.norm == "mars"

    @property
    def settles_factors(self) -> bool:
        """What is put in the place of factors has to be within the radius before they are merged."""
        return self.radius is not None

    @property
    def requirements(self) -> Requirements:
        """Weights that can be put at a radius."""
        return Requirements(float32_weights=self.radius is not None)

    def prepare(self, context: Context) -> None:
        """Remember the start."""
        self._held = [] if self.radius is None else list(_found(context.model))

    def after_optimizer_step(self, step: int) -> None:
        """Take what moved too far back to the radius."""
        self._shorten()

    def settle(self, model: Any) -> None:
        """Do so with what another part has put in the place of the weights; what is merged was within it."""
        self._shorten()

    @torch.no_grad()
    def _shorten(self) -> None:
        if self.radius is None:
            return
        reached = []
        with parametrize.cached():  # all experts' factors are projected at once
            for held in self._held:
                update = held.update()
                if update is None:
                    continue
                moved = norms(update, self.norm)
                if bool((moved > self.radius).any()):
                    held.scale((self.radius / moved.clamp_min(torch.finfo(moved.dtype).tiny)).clamp_max(1.0), update)
                reached.append(moved >= 0.999 * self.radius)
        if reached:
            self._at_radius = float(torch.cat([each.cpu() for each in reached]).float().mean())

    def summary(self) -> dict[str, Any]:
        """Return the share of rows that ended at the radius, within a thousandth, of what trained."""
        return {} if self.radius is None else {"pgm_share_at_radius": self._at_radius}
