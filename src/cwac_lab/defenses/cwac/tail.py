"""What becomes of the directions behind the protected ones: a slope instead of a cliff.

The weight constraint holds the leading directions V of ``C = X X^T`` and frees all others, however much of the
reference prompts is in them. Of the directions T that come next, with eigenvalues c, updates ``D = (W - W0) T`` can be

* slowed: what an interval moves along direction i is multiplied by ``1 / (1 + s r_i)``, where ``r_i = c_i / mean(c)``,
  the mean over all d eigenvalues. With ``lambda = mean(c) / s`` it is the preconditioner ``lambda (C + lambda I)^-1``
  on the update of the weights, whatever the optimizer is;
* penalised: the loss gets ``s sum_i r_i / d ||D_i||^2 = s tr(dW C_T dW^T) / tr(C)``, the mean square by which the
  outputs of the layer move on reference tokens of unit norm, as far as these lie in T.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils import parametrize

from cwac_lab.core import linalg
from cwac_lab.defenses.cwac.subspace.spec import Subspace
from cwac_lab.models.sites import Matrix

TAILS = ("free", "slowed", "penalised")


def slowing(shares: Float[Tensor, " t"], width: int, strength: float) -> Float[Tensor, " t"]:
    """Return what is taken out of a movement along directions, of 1: ``s r / (1 + s r)``.

    Args:
        shares: The share of the trace of C that each direction holds; ``r`` is it times the width.
        width: Width d of the input.
        strength: s.
    """
    weighed = strength * width * shares
    return weighed / (1 + weighed)


@dataclass
class Tail:
    """The tail of one constrained matrix W of shape (m, d).

    Attributes:
        linear: The matrix.
        basis: T, shape (d, t).
        shares: The share of the trace of C that each of T holds, shape (t,).
        anchor: ``W T`` of the start, or of the weights that were slowed last, shape (m, t); None with adapters.
    """

    linear: Matrix
    basis: Float[Tensor, "d t"]
    shares: Float[Tensor, " t"]
    anchor: Float[Tensor, "m t"] | None

    @classmethod
    def of(cls, linear: Matrix, subspace: Subspace) -> Tail | None:
        """Return the tail of a matrix at its start; None where there is none, or nothing of it trains."""
        name = linear.site.name
        if name not in subspace.tails or (not linear.parameter.requires_grad and linear.adapter is None):
            return None
        basis = subspace.tails[name].to(linear.parameter.device)
        anchor = None
        if linear.adapter is None:
            basis = basis.to(linear.weight.dtype)
            anchor = linalg.product(linear.weight.detach(), basis)
        return cls(linear, basis, subspace.shares[name].to(basis), anchor)

    @torch.no_grad()
    def slow(self, strength: float, *, keep: bool) -> None:
        """Take a share of what moved since the last time out of the weights; ``keep`` remembers what they are now."""
        assert self.anchor is not None
        weight = self.linear.weight
        moved = linalg.product(weight, self.basis) - self.anchor
        taken = moved * slowing(self.shares, self.basis.shape[0], strength)
        weight.sub_(linalg.product(taken, self.basis.T))
        if keep:
            self.anchor += moved - taken

    def penalty(self) -> Float[Tensor, ""]:
        """Return ``tr(dW C_T dW^T) / tr(C)``, of shape ()."""
        with torch.autocast(self.basis.device.type, enabled=False):
            factors = self.linear.factors()
            if factors is not None:
                left, right = factors
                moved = left.float() @ linalg.product(right.float(), self.basis.float())
            else:
                assert self.anchor is not None
                moved = (linalg.product(self.linear.weight, self.basis) - self.anchor).float()
            return (moved.square() * self.shares.float()).sum()


class Tails:
    """The tails of all matrices that are constrained, and what becomes of them."""

    def __init__(self, how: str = "free", strength: float = 0.0) -> None:
        """Start without any; ``how`` is one of ``TAILS``."""
        self.how, self.strength = how, strength
        self._held: list[Tail] = []
        self._of: dict[str, Tail] = {}

    def take(self, linears: Iterable[Matrix], subspace: Subspace) -> None:
        """Take the matrices at their start, those that have a tail."""
        tails = (Tail.of(linear, subspace) for linear in linears)
        self._held = [tail for tail in tails if tail is not None]
        self._of = {tail.linear.site.name: tail for tail in self._held}

    @property
    def slows(self) -> bool:
        """Whether weights are to be slowed; factors of adapters are in what they do."""
        return self.how == "slowed" and any(tail.anchor is not None for tail in self._held)

    def slow(self, *, keep: bool) -> None:
        """Slow all weights that are to be, and remember them if ``keep``."""
        for tail in self._held if self.slows else ():
            tail.slow(self.strength, keep=keep)

    def terms(self) -> dict[str, Float[Tensor, ""]]:
        """Return the weighted penalty, of shape (), where there is one."""
        if self.how != "penalised" or not self._held:
            return {}
        with parametrize.cached():  # all experts' factors are projected at once
            return {"tail": self.strength * torch.stack([tail.penalty() for tail in self._held]).sum()}

    def beside(self, site: str) -> tuple[Float[Tensor, "d t"], Float[Tensor, " t"]] | None:
        """Return the slowed tail of an adapter's site, by name, and what is taken out of each of its directions."""
        found = self._of.get(site) if self.how == "slowed" else None
        return None if found is None else (found.basis, slowing(found.shares, len(found.basis), self.strength))

    def state(self) -> dict[str, Tensor]:
        """Return the weights along slowed tails, as they were when these were slowed last."""
        held = enumerate(self._held) if self.slows else ()
        return {f"tail{at}": tail.anchor for at, tail in held if tail.anchor is not None}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take back what ``state`` returned."""
        for at, tail in enumerate(self._held):
            if tail.anchor is not None and f"tail{at}" in state:
                tail.anchor = state[f"tail{at}"].to(tail.anchor)
