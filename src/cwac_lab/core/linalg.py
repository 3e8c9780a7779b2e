"""Pure functions of linear algebra behind the weight constraint (paper section on the safety subspace)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

# Of the range finder: columns beyond the rank, and powers of C.
OVERSAMPLING, ITERATIONS = 10, 2


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Let products of float32 matrices keep all 23 bits while the block runs, whatever a user has allowed.

    TF32 rounds the operands to 10 bits, which leaves about 5e-3 of an update along directions that it is to have no
    part in. Off are TF32 (``allow_tf32``, ``set_float32_matmul_precision``, ``fp32_precision``), bfloat16 products on
    CPUs that have them, and autocast; at the end all flags are as they were.

    Args:
        device: Where the matrices are.
    """
    flags = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    were = [each.fp32_precision for each in flags]
    try:
        old: str | None = torch.get_float32_matmul_precision()
    except RuntimeError:  # only the newer names were set, which this older one cannot tell
        old = None
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if old is not None:
            torch.set_float32_matmul_precision(old)
        for each, was in zip(flags, were, strict=True):
            each.fp32_precision = "none"
            if each.fp32_precision != was:  # else it follows what is set for all of torch
                each.fp32_precision = was


def leading_eigenbasis(
    second_moment: Float[Tensor, "d d"], *, energy: float | None = None, rank: int | None = None
) -> tuple[Float[Tensor, "d k"], Float[Tensor, " k"]]:
    """Return the leading eigenvectors V of a second-moment matrix ``C = X X^T``, and each one's share of the trace.

    V spans the *complement* of the paper's safety subspace: the paper's ``U`` (small eigenvalues) satisfies
    ``U U^T = I - V V^T``. At low energies V has far fewer columns.

    Args:
        second_moment: Symmetric positive semi-definite matrix, shape (d, d); computed on in float64.
        energy: Keep the fewest eigenvectors whose eigenvalues sum to at least this share of the trace, in (0, 1].
        rank: Keep exactly this many; exactly one of ``energy`` and ``rank`` is given.

    Returns:
        V of shape (d, k) with orthonormal columns in the dtype of the input, and the share of the trace that each
        column holds, shape (k,), falling.

    Raises:
        ValueError: If both or neither of ``energy`` and ``rank`` are given, or one is out of range.
    """
    values, vectors = torch.linalg.eigh(second_moment.double())
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    rank = _rank(values, second_moment.shape[0], energy, rank)
    return vectors[:, :rank].to(second_moment.dtype).contiguous(), _shares(values[:rank], values.sum())


def _rank(values: Float[Tensor, " n"], width: int, energy: float | None, rank: int | None) -> int:
    """Return how many of the sorted eigenvalues of a (width x width) matrix are kept; the rest of them may be zero."""
    if (energy is None) == (rank is None):
        raise ValueError("give exactly one of energy and rank")
    if rank is not None:
        if not 0 <= rank <= width:
            raise ValueError(f"rank={rank} must lie in 0..{width}")
        return rank
    assert energy is not None
    if not 0 < energy <= 1:
        raise ValueError(f"energy={energy} must lie in (0, 1]")
    # At energy 1 everything above rounding counts; a plain cumulative sum would keep noise directions too.
    return min(_support(values, width), reaching(values, energy * float(values.sum())))


def reaching(values: Float[Tensor, " n"], wanted: float) -> int:
    """Return how many of some values, from the first on, it takes until they sum to what is wanted, up to rounding."""
    return int((torch.cumsum(values, 0) < wanted * (1 - 1e-12)).sum()) + 1


def _support(values: Float[Tensor, " n"], width: int) -> int:
    """Return how many of the sorted eigenvalues of a (width x width) matrix are above rounding."""
    return int((values > width * torch.finfo(torch.float64).eps * values[0]).sum()) if len(values) else 0


def _shares(values: Float[Tensor, " k"], total: Float[Tensor, ""]) -> Float[Tensor, " k"]:
    return values / total if total > 0 else torch.zeros_like(values)


def leading_directions(
    x: Float[Tensor, "n d"], *, energy: float | None = None, rank: int | None = None
) -> tuple[Float[Tensor, "d k"], Float[Tensor, " k"]]:
    """Return what ``leading_eigenbasis`` does for ``C = X^T X``, by the Gram matrix ``X X^T``, small for n < d.

    With ``X X^T = Q L Q^T`` the directions are ``X^T Q L^(-1/2)``; they are orthonormalised once more, as division by a
    small eigenvalue magnifies rounding. A ``rank`` above that of X gives as many directions as X has.

    Args:
        x: Tokens, shape (n, d); computed on in float64.
        energy: As for ``leading_eigenbasis``.
        rank: Likewise.

    Raises:
        ValueError: Likewise.
    """
    rows = x.double()
    values, vectors = torch.linalg.eigh(rows @ rows.T)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    rank = min(_rank(values, x.shape[1], energy, rank), _support(values, x.shape[1]))
    directions = rows.T @ (vectors[:, :rank] / values[:rank].sqrt())
    return torch.linalg.qr(directions).Q.to(x.dtype).contiguous(), _shares(values[:rank], values.sum())


def range_finder(
    x: Float[Tensor, "n d"], rank: int, *, seed: int = 0
) -> tuple[Float[Tensor, "d k"], Float[Tensor, " k"]]:
    """Return about what ``leading_directions`` returns for a fixed rank, without any matrix of n x n or d x d.

    Randomized subspace iteration (Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1) with ``OVERSAMPLING``
    further columns and ``ITERATIONS`` powers.

    Args:
        x: Tokens, shape (n, d); computed on in float64.
        rank: Number of directions, at most the smaller side of ``x``.
        seed: Seed of the start.

    Returns:
        Orthonormal directions of shape (d, k), and the share of ``||X||_F^2`` that each holds, shape (k,).
    """
    rows = x.double()
    width = min(rank + OVERSAMPLING, *x.shape)
    source = torch.Generator().manual_seed(seed)
    # Drawn on the side of the width, so that the order of the tokens does not matter.
    basis = torch.randn(x.shape[1], width, generator=source, dtype=torch.float64).to(x.device)
    for _ in range(ITERATIONS + 1):
        basis = torch.linalg.qr(rows.T @ torch.linalg.qr(rows @ basis).Q).Q
    _, singular, right = torch.linalg.svd(rows @ basis, full_matrices=False)
    directions = basis @ right[:rank].T
    return directions.to(x.dtype).contiguous(), _shares(singular[:rank].square(), rows.square().sum())


def remove_span(
    matrix: Float[Tensor, "m d"], basis: Float[Tensor, "d k"], shares: Float[Tensor, " k"] | None = None
) -> Float[Tensor, "m d"]:
    """Return ``M (I - V V^T)``: each row of ``matrix`` without its part in the span of ``basis`` (orthonormal).

    With ``shares`` s of [0, 1] only these of the parts are taken out: ``M (I - V diag(s) V^T)``.
    """
    with full_float32(matrix.device):
        along = matrix @ basis
        return matrix - (along if shares is None else along * shares) @ basis.T


def complement(basis: Float[Tensor, "d k"]) -> Float[Tensor, "d q"]:
    """Return orthonormal directions U, shape (d, d - k), of all that is orthogonal to V: ``U U^T = I - V V^T``.

    By Householder reflections, in float32 or wider, so that U is as orthogonal to V as V's columns are to each other.
    """
    wide = basis if basis.dtype == torch.float64 else basis.float()
    return torch.linalg.qr(wide, mode="complete").Q[:, basis.shape[1] :].to(basis.dtype).contiguous()


def product(left: Float[Tensor, "m r"], right: Float[Tensor, "r d"]) -> Float[Tensor, "m d"]:
    """Return ``L R`` without rounding the operands."""
    with full_float32(left.device):
        return left @ right


def restore_on_span_(
    weight: Float[Tensor, "m d"], basis: Float[Tensor, "d k"], anchor: Float[Tensor, "m k"]
) -> Float[Tensor, "m k"]:
    """Set ``W V`` back to its start in place: ``W <- W - (W V - W0 V) V^T``, with ``anchor = W0 V``.

    After it ``(W - W0) V = 0`` up to rounding, whatever the optimizer did; no copy of W0 is needed.

    Returns:
        The deviation ``W V - W0 V`` that was removed, shape (m, k).
    """
    with full_float32(weight.device):
        deviation = weight @ basis - anchor
        weight.addmm_(deviation, basis.T, alpha=-1)
    return deviation


def restore_off_free_(
    weight: Float[Tensor, "m d"], free: Float[Tensor, "d q"], start: Float[Tensor, "m d"]
) -> Float[Tensor, "m d"]:
    """Do what ``restore_on_span_`` does by the complement U of V: ``W <- W0 + (W - W0) U U^T``, in place.

    It takes fewer multiplications where U has fewer columns than V, and a copy of W0 instead of ``W0 V``.

    Returns:
        What was removed, ``(W - W0) V V^T``, shape (m, d); its norm is that of ``(W - W0) V``.
    """
    with full_float32(weight.device):
        moved = weight - start
        kept = (moved @ free) @ free.T
        weight.copy_(start + kept)
    return moved - kept


def squared_norm_of_product(left: Float[Tensor, "m r"], right: Float[Tensor, "r d"]) -> Float[Tensor, ""]:
    """Return ``||L R||_F^2 = tr((L^T L)(R R^T))`` of shape (), without forming the product."""
    return ((left.T @ left) * (right @ right.T)).sum()


def leak(delta: Float[Tensor, "m d"], basis: Float[Tensor, "d k"]) -> tuple[float, float]:
    """Return ``||dW V||_F^2`` and ``||dW||_F^2``; the leak of several matrices is the root of the ratio of sums."""
    return float(product(delta, basis).double().square().sum()), float(delta.double().square().sum())
