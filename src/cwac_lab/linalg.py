"""Pure functions of linear algebra behind the weight constraint (paper section on the safety subspace)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def leading_eigenbasis(
    second_moment: Float[Tensor, "d d"], *, energy: float | None = None, rank: int | None = None
) -> tuple[Float[Tensor, "d k"], float]:
    """Return the leading eigenvectors V of a second-moment matrix ``C = X X^T`` and the share of the trace they hold.

    V spans the *complement* of the paper's safety subspace: the paper's ``U`` (small eigenvalues) satisfies
    ``U U^T = I - V V^T``, and V has far fewer columns.

    Args:
        second_moment: Symmetric positive semi-definite matrix, shape (d, d); computed on in float64.
        energy: Keep the fewest eigenvectors whose eigenvalues sum to at least this share of the trace, in (0, 1].
        rank: Keep exactly this many; exactly one of ``energy`` and ``rank`` is given.

    Returns:
        V of shape (d, k) with orthonormal columns in the dtype of the input, and the share of the trace kept.

    Raises:
        ValueError: If both or neither of ``energy`` and ``rank`` are given, or one is out of range.
    """
    width = second_moment.shape[0]
    if (energy is None) == (rank is None):
        raise ValueError("give exactly one of energy and rank")
    values, vectors = torch.linalg.eigh(second_moment.double())
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    total = values.sum()
    if rank is None:
        assert energy is not None
        if not 0 < energy <= 1:
            raise ValueError(f"energy={energy} must lie in (0, 1]")
        # At energy 1 everything above rounding counts; a plain cumulative sum would keep noise directions too.
        floor = width * torch.finfo(torch.float64).eps * values[0]
        support = int((values > floor).sum())
        reached = int((torch.cumsum(values, 0) < energy * total * (1 - 1e-12)).sum()) + 1
        rank = min(support, reached)
    elif not 0 <= rank <= width:
        raise ValueError(f"rank={rank} must lie in 0..{width}")
    kept = float(values[:rank].sum() / total) if total > 0 else 0.0
    return vectors[:, :rank].to(second_moment.dtype).contiguous(), kept


def remove_span(matrix: Float[Tensor, "m d"], basis: Float[Tensor, "d k"]) -> Float[Tensor, "m d"]:
    """Return ``M (I - V V^T)``: each row of ``matrix`` without its part in the span of ``basis`` (orthonormal)."""
    return matrix - (matrix @ basis) @ basis.T


def restore_on_span_(
    weight: Float[Tensor, "m d"], basis: Float[Tensor, "d k"], anchor: Float[Tensor, "m k"]
) -> Float[Tensor, "m k"]:
    """Set ``W V`` back to its start in place: ``W <- W - (W V - W0 V) V^T``, with ``anchor = W0 V``.

    After it ``(W - W0) V = 0`` up to rounding, whatever the optimizer did; no copy of W0 is needed.

    Returns:
        The deviation ``W V - W0 V`` that was removed, shape (m, k).
    """
    deviation = weight @ basis - anchor
    weight.addmm_(deviation, basis.T, alpha=-1)
    return deviation


def squared_norm_of_product(left: Float[Tensor, "m r"], right: Float[Tensor, "r d"]) -> Float[Tensor, ""]:
    """Return ``||L R||_F^2 = tr((L^T L)(R R^T))`` of shape (), without forming the product."""
    return ((left.T @ left) * (right @ right.T)).sum()


def leak(delta: Float[Tensor, "m d"], basis: Float[Tensor, "d k"]) -> tuple[float, float]:
    """Return ``||dW V||_F^2`` and ``||dW||_F^2``; the leak of several matrices is the root of the ratio of sums."""
    return float((delta @ basis).double().square().sum()), float(delta.double().square().sum())
