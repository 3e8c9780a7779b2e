"""Linear layers whose updates have no part in a span: by projected gradients, or by projected factors of LoRA."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.parametrize import register_parametrization

from cwac_lab import linalg
from cwac_lab.models.shards import whole


class _Linear(torch.autograd.Function):
    """``y = x W^T + b`` with the gradient ``G (I - V V^T)`` for W, where ``G = g^T x`` is the plain one."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "*B d"],
        weight: Float[Tensor, "m d"],
        bias: Float[Tensor, " m"] | None,
        basis: Float[Tensor, "d k"],
    ) -> Float[Tensor, "*B m"]:
        ctx.save_for_backward(x, weight, basis)
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(
        ctx: Any, grad: Float[Tensor, "*B m"]
    ) -> tuple[Float[Tensor, "*B d"] | None, Float[Tensor, "m d"] | None, Float[Tensor, " m"] | None, None]:
        x, weight, basis = ctx.saved_tensors
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        of_x = (grad @ weight.to(grad.dtype)).to(x.dtype) if need_x else None
        rows, of_weight = grad.flatten(0, -2), None
        if need_weight:
            inputs = x.flatten(0, -2)
            # G (I - V V^T) = g^T (x (I - V V^T)): projected is what has fewer rows, the T tokens of x or the m of G;
            # in float32, as most of a token lies in the span of V and bfloat16 would leave a hundredth of it.
            if len(inputs) < len(weight):
                of_weight = rows.T @ linalg.remove_span(inputs.float(), basis.float()).to(grad.dtype)
            else:
                of_weight = linalg.remove_span((rows.T @ inputs.to(grad.dtype)).float(), basis.float())
            of_weight = of_weight.to(weight.dtype)
        return of_x, of_weight, rows.sum(0).to(weight.dtype) if need_bias else None, None


class ProjectedLinear(torch.nn.Linear):
    """A linear layer with weight W (m, d) and a basis V (d, k) that its weight's gradients have no part in."""

    directions: Float[Tensor, "d k"]

    def forward(self, input: Float[Tensor, "*B d"]) -> Float[Tensor, "*B m"]:
        """Return ``x W^T + b`` for inputs of shape (*B, d)."""
        return _Linear.apply(input, self.weight, self.bias, self.directions)  # type: ignore[no-untyped-call]


def project_gradients(module: torch.nn.Linear, basis: Float[Tensor, "d k"]) -> None:
    """Turn a linear layer into a projected one, in place; its parameters and what is saved of it stay as they are."""
    module.__class__ = ProjectedLinear
    module.directions = basis


def release(module: torch.nn.Linear) -> None:
    """Turn a projected layer back into a plain one."""
    module.__class__ = torch.nn.Linear
    del module.directions


class _WithoutSpan(torch.nn.Module):
    """``A -> A (I - V V^T)`` for A of shape (r, d) and a basis V of shape (d, k)."""

    basis: Float[Tensor, "d k"]

    def __init__(self, basis: Float[Tensor, "d k"]) -> None:
        super().__init__()
        self.register_buffer("basis", basis, persistent=False)

    def forward(self, factor: Float[Tensor, "r d"]) -> Float[Tensor, "r d"]:
        """Return the projected factor."""
        factor = whole(factor)
        with torch.autocast(factor.device.type, enabled=False):
            return linalg.remove_span(factor, self.basis)


def project_factor(adapter: Any, basis: Float[Tensor, "d k"]) -> None:
    """Project the factor A of a LoRA layer, in place and for good: ``B A (I - V V^T) x`` is what the layer adds to W x.

    So the update has no part in the span of V under any optimizer, and PEFT merges the projected factor.
    """
    (key,) = adapter.active_adapters
    register_parametrization(adapter.lora_A[key], "weight", _WithoutSpan(basis))
