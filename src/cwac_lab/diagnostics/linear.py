"""Why the output of a linear layer changed: by its weights, by its input, or by both at once.

With ``dW = W - W0`` and ``dh = h - h0`` the change is exactly ``W h - W0 h0 = dW h0 + W0 dh + dW dh``. CWAC motivates
its two constraints by the first two parts (its decomposition of drift) and drops the third, which is reported here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cwac_lab.core import linalg
from cwac_lab.defenses.cwac.subspace.span import Span
from cwac_lab.models.sites import Matrix, Site, linears

# Leading directions of the inputs that are compared before and after; tokens up to which they are found exactly.
DIRECTIONS, EXACT = 16, 2048


@dataclass(frozen=True)
class Drift:
    """How one linear layer moved on some prompts; norms over all counted tokens, relative to ``||W0 h0||_F``.

    Attributes:
        name: Parameter name of W.
        layer: Index of the decoder layer.
        weight: ``||dW h0||``, what the weight constraint bounds on its reference prompts.
        activation: ``||W0 dh||``, what other layers did to the input.
        cross: ``||dW dh||``.
        total: ``||W h - W0 h0||``.
        gap: ``||(dW h0 + W0 dh + dW dh) - (W h - W0 h0)||``: rounding only.
        overlap: Mean squared cosine of the principal angles between the leading directions of h0 and of h.
        leak: ``||dW V||_F / ||dW||_F`` for the directions V of a safety subspace, where there is one.
        bound: What ``bound`` gives for ``total``, where it was asked for.
    """

    name: str
    layer: int
    weight: float
    activation: float
    cross: float
    total: float
    gap: float
    overlap: float
    leak: float | None
    bound: float | None


def decompose(
    h0: Float[Tensor, "N d"], h: Float[Tensor, "N d"], w0: Float[Tensor, "m d"], dw: Float[Tensor, "m d"]
) -> dict[str, float]:
    """Return the norms of the parts of ``W h - W0 h0``, their sum's gap to it, all relative to ``||W0 h0||_F``.

    Args:
        h0: Inputs before, N tokens.
        h: Inputs of the same tokens now.
        w0: Weight before.
        dw: How far it has moved.
    """
    before, dh = h0 @ w0.T, h - h0
    parts = {"weight": h0 @ dw.T, "activation": dh @ w0.T, "cross": dh @ dw.T}
    total = h @ (w0 + dw).T - before
    norms = {name: part.double().norm() for name, part in parts.items()}
    norms |= {"total": total.double().norm(), "gap": (sum(parts.values()) - total).double().norm()}
    scale = before.double().norm().clamp_min(torch.finfo(torch.float64).tiny)
    return {name: float(norm / scale) for name, norm in norms.items()}


def bound(
    h0: Float[Tensor, "N d"], h: Float[Tensor, "N d"], w0: Float[Tensor, "m d"], dw: Float[Tensor, "m d"],
    span: Span,
) -> float:  # fmt: skip
    """Return an upper bound of ``||W h - W0 h0||_F``, relative to ``||W0 h0||_F``, that both constraints enter.

    ``||dW V|| ||V^T h0|| + ||dW|| ||(I - V V^T) h0|| + (||W0|| + ||dW||) ||dh||`` with spectral norms of matrices: the
    weight constraint makes the first part zero and leaves the second only where prompts reach beyond V; the activation
    constraint is about the last.

    Args:
        h0: Inputs before, N tokens.
        h: Inputs of the same tokens now.
        w0: Weight before.
        dw: How far it has moved.
        span: That of the safety subspace's directions V.
    """
    held, free = span.squares(h0).sum().sqrt(), span.without(h0).norm()
    leaked, moved, start = (torch.linalg.matrix_norm(each, 2) for each in (dw - span.without(dw), dw, w0))
    most = leaked * held + moved * free + (start + moved) * (h - h0).norm()
    return float(most / (h0 @ w0.T).norm().clamp_min(torch.finfo(most.dtype).tiny))


def leading(h: Float[Tensor, "N d"]) -> Float[Tensor, "d k"]:
    """Return the leading directions of some inputs, of many tokens by a randomized method."""
    rank = min(DIRECTIONS, *h.shape)
    return (linalg.leading_directions(h, rank=rank) if len(h) <= EXACT else linalg.range_finder(h, rank))[0]


def overlap(before: Float[Tensor, "d k"], now: Float[Tensor, "d k"]) -> float:
    """Return the mean squared cosine of the principal angles between two spans of orthonormal directions."""
    return float(torch.linalg.svdvals(before.T @ now).square().mean())


class LinearProbe:
    """The linear layers of a start, and their inputs on some prompts."""

    def __init__(
        self, seen: dict[Site, Float[Tensor, "N d"]], start_weight: Callable[[str], Tensor], scope: str = "ffn_out"
    ) -> None:
        """Take what was seen of the start.

        Args:
            seen: Inputs by site.
            start_weight: Reader of a start weight by parameter name.
            scope: Linear layers, a key of ``SCOPES``.
        """
        self._start, self._start_weight, self._scope = seen, start_weight, scope
        self._leading = {site: leading(h0) for site, h0 in seen.items()}

    @torch.no_grad()
    def measure(
        self, model: Any, seen: dict[Site, Float[Tensor, "N d"]], spans: dict[str, Span] | None = None,
        *, bounds: bool = False,
    ) -> list[Drift]:  # fmt: skip
        """Return how every linear layer of the scope has moved.

        Args:
            model: The model now, with adapters or without.
            seen: What it has for inputs, of the same tokens.
            spans: Those of a safety subspace's directions V, by site name.
            bounds: Compute the bounds too, where there are directions: three spectral norms a layer.
        """
        angles = {site: overlap(self._leading[site], leading(h)) for site, h in seen.items()}
        with linalg.full_float32(torch.device("cpu")):
            return [self._drift(matrix, seen, angles, spans or {}, bounds) for matrix in linears(model, self._scope)]

    def _drift(
        self, matrix: Matrix, now: dict[Site, Float[Tensor, "N d"]], angles: dict[Site, float],
        spans: dict[str, Span], bounds: bool,
    ) -> Drift:  # fmt: skip
        w0 = matrix.of(self._start_weight(matrix.name)).float().cpu()
        dw = matrix.update(lambda: w0.to(matrix.parameter.device)).cpu()
        h0, h = self._start[matrix.site], now[matrix.site]
        span, leak, most = spans.get(matrix.site.name), None, None
        if span is not None:
            span = span.to(dw.device)
            leaked, moved = span.leak(dw)
            leak = (leaked / moved) ** 0.5 if moved else 0.0
            most = bound(h0, h, w0, dw, span) if bounds else None
        parts = decompose(h0, h, w0, dw)
        return Drift(matrix.name, matrix.site.layer, **parts, overlap=angles[matrix.site], leak=leak, bound=most)
