"""Linear layers whose weights bitsandbytes holds in few bits: made, read, and turned back into plain ones."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cwac_lab.core.errors import LabError

# NF4 numbers that share a scale.
BLOCK = 64


def in_few_bits(module: torch.nn.Module) -> bool:
    """Tell whether bitsandbytes holds a linear layer's weight in 4 or 8 bits."""
    return isinstance(module, torch.nn.Linear) and type(module.weight).__name__ in ("Params4bit", "Int8Params")


def plain(linear: Any) -> torch.nn.Linear:
    """Return a plain linear layer in float32 with the weight that another stands for."""
    weight = dense(linear)
    plain = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    plain.weight = torch.nn.Parameter(weight, requires_grad=False)
    plain.bias = linear.bias
    return plain


def quantized(linear: torch.nn.Linear) -> torch.nn.Linear:
    """Return a linear layer with the weight in blocks of 4-bit NormalFloat.

    Raises:
        LabError: If blocks would reach over rows, which bitsandbytes reads wrongly on the CPU (seen with 0.50.2).
    """
    from bitsandbytes.nn import Linear4bit

    if linear.weight.device.type == "cpu" and linear.in_features % BLOCK:
        raise LabError(
            f"tuning.base=nf4: a layer of width {linear.in_features}; accepted on the CPU: multiples of {BLOCK}"
        )
    made = Linear4bit(
        linear.in_features, linear.out_features, linear.bias is not None, linear.weight.dtype, quant_type="nf4"
    )
    made.load_state_dict(linear.state_dict())
    keep_layout(made)
    return made.to(linear.weight.device).requires_grad_(False)


def keep_layout(model: torch.nn.Module) -> None:
    """Have layers in 4 bits keep the layout that ``dense`` reads, in place.

    Where the CPU has AVX-512 with bfloat16, bitsandbytes (0.50.2) puts the bytes of such a layer into another order
    when it is first asked in eval mode, and rounds the scales. PEFT then reads other weights than the model uses.
    """
    module: Any
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
            module.state_dict()  # puts what is in that order back, but for scales that are not quantised themselves
            state = module.weight.quant_state
            if state is not None and state.absmax.ndim == 2:
                state.absmax = state.absmax.T.reshape(-1).float().contiguous()


def dense(linear: torch.nn.Linear) -> Float[Tensor, "m d"]:
    """Return a new copy of a layer's weight in float32, whatever it is held in."""
    weight: Tensor = linear.weight
    if in_few_bits(linear):
        from peft.utils.integrations import dequantize_bnb_weight

        weight = dequantize_bnb_weight(weight, getattr(linear, "state", None))
    return weight.detach().to(torch.float32, copy=True)
