"""Weights whose updates have no part in a span: by projected gradients, or by projected factors of LoRA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.utils.parametrize import is_parametrized, register_parametrization, remove_parametrizations
from torch.utils.hooks import RemovableHandle

from cwac_lab.core import linalg
from cwac_lab.core.errors import LabError
from cwac_lab.defenses.cwac.subspace.span import Span
from cwac_lab.models.shards import like, whole
from cwac_lab.models.sites import Matrix

# How much longer a multiplication in float32 takes than one in 16 bits on a GPU; of an H100's data sheet, rounded down.
WIDE = 8


def cheapest_order(n: int, width: int, rows: int, columns: int, wide: int = 1, *, free: bool = False) -> str:
    """Return the order of products that takes the fewest multiplications for ``g^T x (I - V V^T)``.

    Args:
        n: Tokens T of x.
        width: Width d of x.
        rows: Rows m of the weights that read x, together.
        columns: Columns of V or U, by which the span is held.
        wide: What a multiplication with V or U counts, which is in float32; one with g counts 1.
        free: Whether it is held by U.

    Returns:
        ``tokens``: x is projected first. ``gradients``: ``g^T x`` is. ``coordinates``, with U: ``(g^T (x U)) U^T``,
        which can take fewer than the plain gradient ``g^T x``.
    """
    costs = {"tokens": n * width * (2 * wide * columns + rows), "gradients": rows * width * (2 * wide * columns + n)}
    if free:
        costs["coordinates"] = columns * (wide * n * width + n * rows + wide * rows * width)
    return min(costs, key=costs.__getitem__)


class Projection:
    """The projected gradients of the layers that read one input x (q, k and v; gate and up): x is projected once.

    Their backward passes follow each other, so of all sites only what was computed last is kept: x and its projection.
    Changes of x in place are seen, except those through ``x.data``.
    """

    # Input, its version, the projection it is of, and its projected tokens (or their coordinates).
    _last: ClassVar[tuple[Tensor, int, Projection, Tensor] | None] = None

    def __init__(self, span: Span, readers: int, rows: int) -> None:
        """Take the span of V, how many layers read x, and how many rows their weights have together."""
        self.span, self.readers, self.rows = span, readers, rows

    def _kept(self, x: Float[Tensor, "*B d"]) -> Float[Tensor, "T c"] | None:
        if Projection._last is None:
            return None
        of, version, owner, projected = Projection._last
        # Memory of what is kept belongs to no other tensor.
        same = of.data_ptr() == x.data_ptr() and of.shape == x.shape and of.stride() == x.stride()
        return projected if same and version == x._version and owner is self else None

    def _once(self, x: Float[Tensor, "*B d"], project: Callable[[Tensor], Tensor]) -> Float[Tensor, "T c"]:
        """Return the tokens of x, projected in full float32: bfloat16 would leave a hundredth of what lies along V."""
        projected = self._kept(x)
        if projected is None:
            projected = project(x.detach().flatten(0, -2).float())
            if self.readers > 1:
                Projection._last = x.detach(), x._version, self, projected
        return projected

    def gradient(self, rows: Float[Tensor, "T m"], x: Float[Tensor, "*B d"]) -> Float[Tensor, "m d"]:
        """Return ``g^T x (I - V V^T)`` for the gradients g of a layer's outputs.

        Products with g are in the precision of training; what their rounding moves along V is taken out where weights
        are restored.
        """
        span = self.span
        short = rows.is_cuda and rows.dtype in (torch.bfloat16, torch.float16)
        n, factor = len(rows), WIDE if short else 1
        order = cheapest_order(n, span.width, self.rows, span.columns.shape[1], factor, free=span.free)
        if order == "tokens":
            return rows.T @ self._once(x, span.without).to(rows.dtype)
        if order == "gradients":
            return span.without(rows.T @ x.flatten(0, -2).to(rows.dtype))
        free = span.columns.float()
        coordinates = self._once(x, lambda tokens: linalg.product(tokens, free))
        return linalg.product((rows.T @ coordinates.to(rows.dtype)).float(), free.T)


class _Linear(torch.autograd.Function):
    """``y = x W^T + b`` with the gradient ``G (I - V V^T)`` for W, where ``G = g^T x`` is the plain one."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "*B d"],
        weight: Float[Tensor, "m d"],
        bias: Float[Tensor, " m"] | None,
        projection: Projection,
    ) -> Float[Tensor, "*B m"]:
        ctx.save_for_backward(x, weight)
        ctx.projection = projection
        return functional.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Float[Tensor, "*B m"]
    ) -> tuple[Float[Tensor, "*B d"] | None, Float[Tensor, "m d"] | None, Float[Tensor, " m"] | None, None]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        of_x = (grad @ weight.to(grad.dtype)).to(x.dtype) if need_x else None
        rows, of_weight = grad.flatten(0, -2), None
        if need_weight:
            of_weight = ctx.projection.gradient(rows, x).to(weight.dtype)
        return of_x, of_weight, rows.sum(0).to(weight.dtype) if need_bias else None, None


class ProjectedLinear(torch.nn.Linear):
    """A linear layer with weight W (m, d) and a basis V (d, k) that its weight's gradients have no part in."""

    projection: Projection

    def forward(self, input: Float[Tensor, "*B d"]) -> Float[Tensor, "*B m"]:
        """Return ``x W^T + b`` for inputs of shape (*B, d)."""
        return _Linear.apply(input, self.weight, self.bias, self.projection)  # type: ignore[no-untyped-call]


def project_gradients(modules: Sequence[torch.nn.Linear], span: Span) -> None:
    """Turn linear layers that read one input into projected ones, in place; their parameters stay as they are."""
    projection = Projection(span, len(modules), sum(module.out_features for module in modules))
    for module in modules:
        module.__class__ = ProjectedLinear
        cast("ProjectedLinear", module).projection = projection


def release(module: torch.nn.Linear) -> None:
    """Turn a projected layer back into a plain one."""
    module.__class__ = torch.nn.Linear
    del module.projection
    Projection._last = None


def project_gradient_of(parameter: torch.nn.Parameter, parts: Sequence[tuple[Matrix, Span]]) -> RemovableHandle:
    """Project the gradient ``G -> G (I - V V^T)`` of every matrix that a parameter holds, until the handle is removed.

    For parameters that are no linear layer's (m, d): those of GPT-2, of experts. It is the whole gradient that is
    projected, whatever it comes from.
    """

    def project(gradient: Tensor) -> Tensor:
        kept = gradient.clone()
        for matrix, span in parts:
            plain = matrix.of(kept)
            plain.copy_(span.without(plain))
        return kept

    handle: RemovableHandle = parameter.register_hook(project)  # type: ignore[no-untyped-call]
    return handle


# Directions T (d, t) beside those of a span, and what of the parts along each is taken out, s (t,).
Beside = tuple[Float[Tensor, "d t"], Float[Tensor, " t"]]


class _FactorWithoutSpan(torch.nn.Module):
    """``A -> A (I - V V^T - T diag(s) T^T)`` for A of shape (r, d), the span of V, and directions T orthogonal to it.

    Of E experts A is (r E, d), and every block of r rows has a span of its own.
    """

    def __init__(self, spans: Sequence[Span], beside: Sequence[Beside | None]) -> None:
        super().__init__()
        self._free, self._beside = [span.free for span in spans], [each is not None for each in beside]
        for number, (span, each) in enumerate(zip(spans, beside, strict=True)):
            self.register_buffer(f"columns{number}", span.columns, persistent=False)
            for name, held in zip(("tail", "share"), each or (), strict=False):
                self.register_buffer(f"{name}{number}", held, persistent=False)

    def _projected(self, part: Float[Tensor, "r d"], number: int, beside: bool) -> Float[Tensor, "r d"]:
        kept = Span(getattr(self, f"columns{number}"), self._free[number]).without(part)
        if beside and self._beside[number]:
            kept = linalg.remove_span(kept, getattr(self, f"tail{number}"), getattr(self, f"share{number}"))
        return kept.to(part.dtype)

    def forward(self, factor: Float[Tensor, "R d"], beside: bool = True) -> Float[Tensor, "R d"]:
        """Return the projected factor; with ``beside`` off only the span is taken out."""
        parts = whole(factor).chunk(len(self._free))
        kept = [self._projected(part, number, beside) for number, part in enumerate(parts)]
        return kept[0] if len(kept) == 1 else torch.cat(kept)


# What a parametrised factor is called among a model's parameters, and in a plain adapter.
_AS_TRAINED, _AS_USED = "parametrizations.weight.original", "weight"


def _saved_as_used(module: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Put the projected factor in the place of the trained one, in what is saved: it is a plain adapter's."""
    if state.pop(prefix + _AS_TRAINED, None) is not None:
        state[prefix + _AS_USED] = module.weight.detach()


def _loaded_as_used(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Take a plain adapter's factor."""
    if is_parametrized(module) and prefix + _AS_USED in state:
        state[prefix + _AS_TRAINED] = state.pop(prefix + _AS_USED)


def project_factor(
    adapter: Any, spans: Sequence[Span], beside: Sequence[Beside | None] | None = None, *, keep_norm: bool = False
) -> None:
    """Project the factor A of a LoRA layer, in place and for good: ``B A (I - V V^T) x`` is what the layer adds to W x.

    Experts that share the factor have a span of V each, in their order, and a linear layer one. With ``beside`` shares
    of the parts along further directions, orthogonal to V, are taken out as well. With ``keep_norm`` the rows of A, or
    of A's blocks, get back the norm that they had. A factor that does not train is projected once, and stays plain.

    So the update has no part in the span of V under any optimizer, PEFT merges the projected factor, and a state that
    is saved at any time holds it under the name that a plain adapter gives it.

    Raises:
        LabError: If it is projected already.
    """
    (key,) = adapter.active_adapters
    factor = adapter.lora_A[key]
    if is_parametrized(factor):
        raise LabError("an adapter is under a constraint already (accepted: a new one)")
    before = whole(factor.weight.detach()).norm(dim=1, keepdim=True)
    register_parametrization(factor, "weight", _FactorWithoutSpan(spans, beside or [None] * len(spans)))
    if keep_norm:
        with torch.no_grad():
            trained = factor.parametrizations.weight.original
            left, norm = (
                factor.parametrizations.weight[0](trained, False),
                whole(factor.weight).norm(dim=1, keepdim=True),
            )
            # What is smaller is rounding: nothing is left.
            trained.copy_(like(trained, torch.where(norm > 1e-4 * before, left * before / norm, left)))
    if not factor.parametrizations.weight.original.requires_grad:
        release_factor(adapter)
        return
    factor.register_state_dict_post_hook(_saved_as_used)
    factor.register_load_state_dict_pre_hook(_loaded_as_used)


def release_factor(adapter: Any) -> None:
    """Make the projected factor a plain one, with the values that it has."""
    (key,) = adapter.active_adapters
    if is_parametrized(adapter.lora_A[key]):
        remove_parametrizations(adapter.lora_A[key], "weight")
