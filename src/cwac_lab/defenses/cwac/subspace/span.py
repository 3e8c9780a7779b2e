"""A span of directions, held by the fewer of two sets: the directions in it, or those that are orthogonal to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cwac_lab.core import linalg


@dataclass(frozen=True)
class Span:
    """The span of k orthonormal directions V of shape (d, k), by V or by its complement U of shape (d, d - k).

    Attributes:
        columns: V or U, of shape (d, c).
        free: Whether it is U, whose directions the constraint leaves free.
    """

    columns: Float[Tensor, "d c"]
    free: bool = False

    @classmethod
    def of(cls, basis: Float[Tensor, "d k"], *, ordered: bool = False) -> Span:
        """Return the span of V, by U where that has fewer columns; ``ordered`` keeps V, as U knows no order of it."""
        width, k = basis.shape
        return cls(basis) if ordered or 2 * k <= width else cls(linalg.complement(basis), free=True)

    @property
    def width(self) -> int:
        """The number of coordinates d."""
        return self.columns.shape[0]

    @property
    def rank(self) -> int:
        """The number of directions k."""
        return self.width - self.columns.shape[1] if self.free else self.columns.shape[1]

    @property
    def basis(self) -> Float[Tensor, "d k"]:
        """V, or as many other orthonormal directions with the same span."""
        return linalg.complement(self.columns) if self.free else self.columns

    @property
    def complement(self) -> Float[Tensor, "d n"]:
        """U of shape (d, d - k): orthonormal directions that span what V does not."""
        return self.columns if self.free else linalg.complement(self.columns)

    def to(self, like: Tensor | torch.device | torch.dtype) -> Span:
        """Return it on a device, in a type, or both as of a tensor."""
        return Span(self.columns.to(like), self.free)

    def without(self, matrix: Float[Tensor, "m d"]) -> Float[Tensor, "m d"]:
        """Return the rows of a matrix without their parts in the span, ``M (I - V V^T)``, in float32."""
        columns = self.columns.float()
        if not self.free:
            return linalg.remove_span(matrix.float(), columns)
        return linalg.product(linalg.product(matrix.float(), columns), columns.T)

    def squares(self, rows: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """Return ``||V^T x||^2`` of every row x, of shape (n,), in the precision of the rows."""
        found = (rows @ self.columns.to(rows.dtype)).square().sum(1)
        return (rows.square().sum(1) - found).clamp_min(0) if self.free else found

    def leak(self, delta: Float[Tensor, "m d"]) -> tuple[float, float]:
        """Return ``||dW V||_F^2`` and ``||dW||_F^2``.

        With U the first is that of ``dW - dW U U^T``, and not ``||dW||^2 - ||dW U||^2``: little of dW lies along V, and
        the difference would be rounding.
        """
        if not self.free:
            return linalg.leak(delta, self.columns.float())
        along = delta.float() - self.without(delta)
        return float(along.double().square().sum()), float(delta.double().square().sum())
