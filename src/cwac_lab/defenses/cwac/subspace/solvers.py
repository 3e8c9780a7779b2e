"""The leading directions of many tokens' activations, by the cheapest of three ways.

For N tokens x of width d, ``C = sum x x^T``:

* ``covariance``: add up C (d x d), then its eigenvectors: ``2 N d^2 + 9 d^3`` operations;
* ``gram``: keep the tokens, eigenvectors of ``X X^T`` (N x N): ``2 N^2 d + 9 N^3``; for fewer tokens than the width;
* ``randomized``: keep the tokens, range finder (Halko et al. 2011) for a fixed rank k far below both: ``12 N d k``;
  it approximates, better the faster the spectrum falls.

How many tokens an expert reads is known only once they are routed: ``routed`` keeps them, then takes the cheaper of the
first two.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from cwac_lab.core import distributed, linalg


class Covariance:
    """Adds up ``C = X^T X`` in float64, as in float32 noise of the product would pass for directions in use."""

    name: ClassVar[str] = "covariance"

    def __init__(self, width: int, device: torch.device) -> None:
        """Start at zero."""
        self.moment = torch.zeros(width, width, dtype=torch.float64, device=device)

    @staticmethod
    def cost(n: int, width: int, rank: int | None) -> float:
        """Return the number of operations."""
        return 2.0 * n * width**2 + 9.0 * width**3

    @staticmethod
    def size(n: int, width: int) -> int:
        """Return the bytes held."""
        return 8 * width**2

    def add(self, x: Float[Tensor, "N d"]) -> None:
        """Take some tokens."""
        self.moment += x.T @ x

    def solve(self, energy: float | None, rank: int | None) -> tuple[Float[Tensor, "d k"], Float[Tensor, " k"]]:
        """Return the directions and each one's share of the trace, over the tokens of all processes."""
        return linalg.leading_eigenbasis(distributed.summed(self.moment), energy=energy, rank=rank)


class Gram:
    """Keeps the tokens in float64, in the memory of the CPU."""

    name: ClassVar[str] = "gram"

    def __init__(self, width: int, device: torch.device) -> None:
        """Start with none."""
        self.device, self.tokens = device, [torch.zeros(0, width, dtype=torch.float64)]

    @staticmethod
    def cost(n: int, width: int, rank: int | None) -> float:
        """Return the number of operations."""
        return 2.0 * n**2 * width + 9.0 * n**3

    @staticmethod
    def size(n: int, width: int) -> int:
        """Return the bytes held."""
        return 8 * n * width

    def add(self, x: Float[Tensor, "N d"]) -> None:
        """Take some tokens."""
        self.tokens.append(x.cpu())

    def solve(self, energy: float | None, rank: int | None) -> tuple[Float[Tensor, "d k"], Float[Tensor, " k"]]:
        """Return the directions and each one's share of the trace, over the tokens of all processes."""
        x = torch.cat(distributed.gathered(torch.cat(self.tokens))).to(self.device)
        return linalg.leading_directions(x, energy=energy, rank=rank)


class Randomized(Gram):
    """Keeps the tokens as well, and approximates."""

    name: ClassVar[str] = "randomized"

    @staticmethod
    def cost(n: int, width: int, rank: int | None) -> float:
        """Return the number of operations; none will do for an unknown rank."""
        return float("inf") if rank is None else 12.0 * n * width * (rank + linalg.OVERSAMPLING)

    def solve(self, energy: float | None, rank: int | None) -> tuple[Float[Tensor, "d k"], Float[Tensor, " k"]]:
        """Return the directions and each one's share of the trace, over the tokens of all processes."""
        assert rank is not None
        x = torch.cat(distributed.gathered(torch.cat(self.tokens))).to(self.device)
        return linalg.range_finder(x, rank)


class Routed(Gram):
    """Keeps the tokens as well, and chooses when they are known."""

    name: ClassVar[str] = "routed"

    def solve(self, energy: float | None, rank: int | None) -> tuple[Float[Tensor, "d k"], Float[Tensor, " k"]]:
        """Return the directions and each one's share of the trace, of all processes; none without tokens."""
        x = torch.cat(distributed.gathered(torch.cat(self.tokens))).to(self.device)
        if len(x) < x.shape[1]:
            return linalg.leading_directions(x, energy=energy, rank=rank)
        return linalg.leading_eigenbasis(x.T @ x, energy=energy, rank=rank)


Solver = Covariance | Gram | Randomized


def cheapest(n: int, width: int, rank: int | None) -> type[Solver]:
    """Return the way with the fewest operations for N tokens of a width, and a rank where it is fixed."""
    kinds: tuple[type[Solver], ...] = (Covariance, Gram, Randomized)
    return min(kinds, key=lambda kind: kind.cost(n, width, rank))
