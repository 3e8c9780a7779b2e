"""Where the linear layers of a decoder sit, named by the activation they read.

Llama, Mistral, Gemma, Qwen, OLMo2, SmolLM3 and Granite share these module names. Layers that read the same input (q, k
and v; gate and up) share one *site*, so that one covariance and one basis serve them all. Phi-3 has such layers as one,
whose rows are theirs: it stands in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cwac_lab.core.errors import LabError, one_of
from cwac_lab.core.linalg import product
from cwac_lab.models.shards import whole

PROJECTIONS = {
    "attn_in": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn_out": ("self_attn.o_proj",),
    "ffn_in": ("mlp.gate_proj", "mlp.up_proj"),
    "ffn_out": ("mlp.down_proj",),
}
# One layer in the place of several that read the same input.
JOINED = {"self_attn.qkv_proj": PROJECTIONS["attn_in"], "mlp.gate_up_proj": PROJECTIONS["ffn_in"]}
# Architectures with these names in every decoder layer, as people call them.
FAMILIES = "Llama, Mistral, Qwen2, Qwen3, Gemma of text only, Phi-3, OLMo2, SmolLM3, Granite"
SCOPES = {
    "ffn_out": ("ffn_out",),
    "ffn": ("ffn_in", "ffn_out"),
    "attention": ("attn_in", "attn_out"),
    "all_linear": ("attn_in", "attn_out", "ffn_in", "ffn_out"),
}


@dataclass(frozen=True)
class Site:
    """The shared input of some linear layers of one decoder layer."""

    layer: int
    kind: str

    @property
    def name(self) -> str:
        """Return the key used in files and logs, e.g. ``layers.3.ffn_out``."""
        return f"layers.{self.layer}.{self.kind}"


def decoder(model: Any) -> Any:
    """Return the decoder stack of a causal language model (embeddings, layers, final norm; no head)."""
    return model.get_decoder()


def decoder_layers(model: Any) -> torch.nn.ModuleList:
    """Return the decoder layers of a causal language model."""
    layers = decoder(model).layers
    assert isinstance(layers, torch.nn.ModuleList)
    return layers


def paths_in(layer: torch.nn.Module, paths: Sequence[str]) -> list[str]:
    """Return paths of linear layers as a decoder layer has them: one in the place of several that it joins."""
    held, found = {name for name, _ in layer.named_modules()}, list(paths)
    for joined, parts in JOINED.items():
        if joined in held and held.isdisjoint(parts) and set(parts) <= set(found):
            found[found.index(parts[0])] = joined
            found = [path for path in found if path not in parts]
    return found


@dataclass(frozen=True)
class Matrix:
    """A linear layer with weight W of shape (m, d), and what LoRA adds to it.

    Attributes:
        site: The input it reads.
        name: Parameter name of W in the plain model.
        layer: The layer, or PEFT's around it.
    """

    site: Site
    name: str
    layer: Any

    @property
    def adapter(self) -> Any:
        """PEFT's layer with the factors B (m, r) and A (r, d), or None."""
        return self.layer if hasattr(self.layer, "base_layer") else None

    @property
    def module(self) -> torch.nn.Linear:
        """The layer that holds W."""
        module = getattr(self.layer, "base_layer", self.layer)
        assert isinstance(module, torch.nn.Linear)
        return module

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        """What trains here: W, or the factors."""
        parts = self.adapter if self.adapter is not None else self.module
        return [p for name, p in parts.named_parameters() if p.requires_grad and name != "bias"]

    @property
    def left(self) -> Float[Tensor, "m r"] | None:
        """The factor B of an adapter that is not merged, or None."""
        if self.adapter is None or self.adapter.merged:
            return None
        (key,) = self.adapter.active_adapters
        factor: Tensor = self.adapter.lora_B[key].weight
        return factor

    def factors(self) -> tuple[Float[Tensor, "m r"], Float[Tensor, "r d"]] | None:
        """Return ``alpha / r B`` and ``A``, whose product is the trained update; None without them."""
        if self.adapter is None:
            return None
        (key,) = self.adapter.active_adapters
        left, right = (whole(factor[key].weight) for factor in (self.adapter.lora_B, self.adapter.lora_A))
        return left * self.adapter.scaling[key], right

    def update(self, start: Callable[[], Float[Tensor, "m d"]]) -> Float[Tensor, "m d"]:
        """Return in float32 how far the weight has moved from ``start``, adapters included, merged or not."""
        factors = self.factors()
        if factors is None or self.adapter.merged:
            return whole(self.module.weight).float() - start().float()
        return product(factors[0].float(), factors[1].float())


def linears(model: Any, scope: str) -> Iterator[Matrix]:
    """Yield every linear layer in a scope.

    Raises:
        LabError: If the model lacks one of the projections (an architecture whose names differ).
    """
    one_of("constraint.modules", scope, SCOPES)
    names = {id(module): name for name, module in model.named_modules()}
    for index, layer in enumerate(decoder_layers(model)):
        for kind in SCOPES[scope]:
            for path in paths_in(layer, PROJECTIONS[kind]):
                try:
                    module = layer.get_submodule(path)
                except AttributeError as error:
                    raise LabError(f"{type(model).__name__} has no {path} in layer {index}") from error
                yield Matrix(Site(index, kind), f"{names[id(module)]}.weight", module)


def depth_to_layer(depth: float, n_layers: int) -> int:
    """Return the index of the layer at a relative ``depth`` in [0, 1): ``int(depth * n_layers)``."""
    return min(int(depth * n_layers), n_layers - 1)
