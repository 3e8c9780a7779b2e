"""One matrix under the weight constraint: what is protected of it, and how it is put back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from cwac_lab.core import linalg
from cwac_lab.defenses.cwac.subspace.span import Span
from cwac_lab.models.shards import local, rows, whole
from cwac_lab.models.sites import Matrix


@dataclass
class Constrained:
    """A matrix W of shape (m, d) whose update has no part along V.

    Attributes:
        linear: The matrix.
        span: That of V.
        anchor: What restores W: ``W0 V`` (m, k), or W0 (m, d) where the span is held by its complement, whole in every
            process; None where W itself does not train, or is never restored.
        merged: The squares of what merged adapters moved, along V and in all.
    """

    linear: Matrix
    span: Span
    anchor: Float[Tensor, "m c"] | None
    merged: tuple[float, float] | None = None

    @classmethod
    def of(cls, linear: Matrix, span: Span, *, restores: bool) -> Constrained:
        """Return a matrix at its start under a constraint; ``restores`` tells whether it will be put back at all."""
        if not restores or linear.adapter is not None or not linear.parameter.requires_grad:
            return cls(linear, span, None)
        weight = linear.weight.detach()
        if span.free:
            return cls(linear, span, whole(weight).clone())
        return cls(linear, span, linalg.product(weight, span.columns))

    def restore(self) -> Tensor:
        """Take out of W what moved along V, and return it (its norm is what counts)."""
        assert self.anchor is not None
        weight = self.linear.weight
        held, anchor = local(weight), rows(weight, self.anchor)
        restore = linalg.restore_off_free_ if self.span.free else linalg.restore_on_span_
        return restore(held, self.span.columns, anchor)

    @property
    def start(self) -> Float[Tensor, "m d"] | None:
        """W0, where that is what restores W."""
        return self.anchor if self.span.free else None

    @property
    def moves(self) -> bool:
        """Whether W trains, and not all of it is free."""
        return self.linear.parameter.requires_grad and self.span.rank > 0


def note_merged(group: Sequence[Constrained], before: Tensor, after: Tensor) -> None:
    """Take a parameter before and after its adapter is merged: what is added is rounded to what the sum can hold."""
    for held in group:
        held.merged = held.span.leak(held.linear.of(after) - held.linear.of(before))
