"""Where the linear layers of a decoder sit, named by the activation they read.

Llama, Mistral, Gemma, Qwen, OLMo2, SmolLM3 and Granite share these module names. Layers that read the same input (q, k
and v; gate and up) share one *site*, so that one covariance and one basis serve them all. Phi-3 and GPT-2 have such
layers as one, whose rows are theirs: it stands in their place. In a mixture of experts the matrices of every expert
stand there, and each expert has sites of its own: it reads the tokens that are routed to it, and no others.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
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
# One layer in the place of several that read the same input: Phi-3's, then GPT-2's.
JOINED = {
    "self_attn.qkv_proj": PROJECTIONS["attn_in"],
    "mlp.gate_up_proj": PROJECTIONS["ffn_in"],
    "attn.c_attn": PROJECTIONS["attn_in"],
    "attn.c_proj": PROJECTIONS["attn_out"],
    "mlp.c_fc": PROJECTIONS["ffn_in"],
    "mlp.c_proj": PROJECTIONS["ffn_out"],
}
# Experts in a decoder layer, and their parameters in the place of linear layers: of E experts (E, m, d).
EXPERTS = "mlp.experts"
OF_EXPERTS = {f"{EXPERTS}.gate_up_proj": PROJECTIONS["ffn_in"], f"{EXPERTS}.down_proj": PROJECTIONS["ffn_out"]}
# Architectures with these names in every decoder layer, as people call them.
FAMILIES = (
    "Llama, Mistral, Qwen2, Qwen3, Gemma of text only, Phi-3, OLMo2, SmolLM3, Granite, GPT-2, "
    "and of mixtures of experts Qwen3-MoE, Mixtral, OLMoE"
)
SCOPES = {
    "ffn_out": ("ffn_out",),
    "ffn": ("ffn_in", "ffn_out"),
    "attention": ("attn_in", "attn_out"),
    "all_linear": ("attn_in", "attn_out", "ffn_in", "ffn_out"),
}


@dataclass(frozen=True)
class Site:
    """The shared input of some linear layers of one decoder layer, or of one expert in it."""

    layer: int
    kind: str
    expert: int | None = None

    @property
    def name(self) -> str:
        """Return the key used in files and logs, e.g. ``layers.3.ffn_out``, ``layers.3.experts.7.ffn_out``."""
        expert = "" if self.expert is None else f"experts.{self.expert}."
        return f"layers.{self.layer}.{expert}{self.kind}"


def decoder(model: Any) -> Any:
    """Return the decoder stack of a causal language model (embeddings, layers, final norm; no head)."""
    return model.get_decoder()


def layers_of(stack: Any) -> Any:
    """Return the list of layers of a decoder stack, which GPT-2 calls ``h``; None where there is none."""
    return getattr(stack, "layers", getattr(stack, "h", None))


def decoder_layers(model: Any) -> torch.nn.ModuleList:
    """Return the decoder layers of a causal language model."""
    layers = layers_of(decoder(model))
    assert isinstance(layers, torch.nn.ModuleList)
    return layers


def is_turned(layer: Any) -> bool:
    """Tell whether a layer holds its weight as (d, m), as GPT-2's do."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(layer, Conv1D)


def is_linear(layer: Any) -> bool:
    """Tell whether a layer is ``x W^T + b``, however it holds its weight."""
    return isinstance(layer, torch.nn.Linear) or is_turned(layer)


def experts_in(layer: torch.nn.Module) -> Any:
    """Return the experts of a decoder layer, or PEFT's layer around them, None where there are none that are known.

    They are known where they compute as Qwen3-MoE's do and no linear layer stands beside them (a shared expert).
    """
    block = getattr(layer, "mlp", None)
    outer = getattr(block, "experts", None)
    found = _plain(outer)
    shapes = [getattr(getattr(found, path.rpartition(".")[2], None), "ndim", 0) for path in OF_EXPERTS]
    others = ("has_bias", "is_transposed", "has_post_expert_norm")
    if shapes != [3, 3] or not getattr(found, "has_gate", False) or any(getattr(found, name, False) for name in others):
        return None
    assert block is not None
    beside = (module for name, module in block.named_modules() if not name.startswith("experts"))
    return None if any(map(is_linear, beside)) else outer


def _plain(layer: Any) -> Any:
    """Return what PEFT's layers, one or several, are around."""
    while hasattr(layer, "base_layer"):
        layer = layer.base_layer
    return layer


def paths_in(layer: torch.nn.Module, paths: Sequence[str], *, experts: bool = True) -> list[str]:
    """Return paths of linear layers as a decoder layer has them: one in the place of several that it joins.

    Args:
        layer: The decoder layer.
        paths: Paths of linear layers, in Llama's names.
        experts: Put the parameters of experts that are known in the place of linear layers as well.
    """
    held, found = {name for name, _ in layer.named_modules()}, list(paths)
    known = OF_EXPERTS if experts and experts_in(layer) is not None else {}
    for joined, parts in {**JOINED, **known}.items():
        if (joined in held or joined in known) and held.isdisjoint(parts) and set(parts) <= set(found):
            found[found.index(parts[0])] = joined
            found = [path for path in found if path not in parts]
    return found


def lefts(factor: Float[Tensor, "m R"], experts: int) -> Float[Tensor, "E m r"]:
    """Return B of every expert, ``R = r E``: in PEFT's factor their columns take turns."""
    return factor.view(len(factor), -1, experts).movedim(2, 0)


def rights(factor: Float[Tensor, "R d"], experts: int) -> Float[Tensor, "E r d"]:
    """Return A of every expert, ``R = r E``: in PEFT's factor the rows of one stand together."""
    return factor.view(experts, -1, factor.shape[1])


@dataclass(frozen=True)
class Matrix:
    """A linear layer with weight W of shape (m, d), or one expert's, and what LoRA adds to it.

    Attributes:
        site: The input it reads.
        name: Name of the parameter in the plain model that holds W, alone or beside those of the other experts.
        layer: The layer or the layer's experts, or PEFT's around them.
    """

    site: Site
    name: str
    layer: Any

    @property
    def adapter(self) -> Any:
        """PEFT's layer with the factors B (m, r) and A (r, d), or None."""
        return self.layer if hasattr(self.layer, "base_layer") else None

    @property
    def module(self) -> Any:
        """The layer that holds W."""
        return _plain(self.layer)

    @property
    def parameter(self) -> torch.nn.Parameter:
        """The parameter that holds W."""
        found: torch.nn.Parameter = getattr(self.module, self.name.rpartition(".")[2])
        return found

    def of(self, value: Tensor) -> Float[Tensor, "m d"]:
        """Return the part for W of something in the shape of the parameter, as (m, d); it shares its memory."""
        if self.site.expert is not None:
            return value[self.site.expert]
        return value.T if is_turned(self.module) else value

    @property
    def weight(self) -> Float[Tensor, "m d"]:
        """W itself: what is written to it is written to the parameter."""
        return self.of(self.parameter)

    @property
    def width(self) -> int:
        """The width d of what it reads; a weight in few bits has another shape."""
        linear = isinstance(self.module, torch.nn.Linear)
        return int(self.module.in_features if linear else self.weight.shape[1])

    @property
    def share(self) -> float:
        """Share of the tokens that it reads; of experts the mean over all of them."""
        if self.site.expert is None:
            return 1.0
        experts = self.module.num_experts
        return float(getattr(self.module.config, "num_experts_per_tok", experts) / experts)

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        """What trains here: the parameter, or the factors."""
        parts = [self.parameter]
        if self.adapter is not None:
            parts = [*self.adapter.lora_A.parameters(), *self.adapter.lora_B.parameters()]
        return [parameter for parameter in parts if parameter.requires_grad]

    @property
    def left(self) -> Float[Tensor, "m r"] | None:
        """The factor B of an adapter that is not merged, or None; what is written to it is written to the adapter."""
        if self.adapter is None or self.adapter.merged:
            return None
        (key,) = self.adapter.active_adapters
        factor: Tensor = self.adapter.lora_B[key].weight
        expert = self.site.expert
        return factor if expert is None else lefts(factor, self.module.num_experts)[expert]

    def factors(self) -> tuple[Float[Tensor, "m r"], Float[Tensor, "r d"]] | None:
        """Return ``alpha / r B`` and ``A``, whose product is the trained update; None without them."""
        if self.adapter is None:
            return None
        (key,) = self.adapter.active_adapters
        left, right = (whole(factor[key].weight) for factor in (self.adapter.lora_B, self.adapter.lora_A))
        if (expert := self.site.expert) is not None:
            n = self.module.num_experts
            left, right = lefts(left, n)[expert], rights(right, n)[expert]
        return left * self.adapter.scaling[key], right

    def update(self, start: Callable[[], Float[Tensor, "m d"]]) -> Float[Tensor, "m d"]:
        """Return in float32 how far the weight has moved from ``start``, adapters included, merged or not."""
        factors = self.factors()
        if factors is None or self.adapter.merged:
            return self.of(whole(self.parameter)).float() - start().float()
        return product(factors[0].float(), factors[1].float())


def linears(model: Any, scope: str) -> Iterator[Matrix]:
    """Yield every linear layer in a scope, and of experts every expert's matrix.

    Raises:
        LabError: If the model lacks one of the projections (an architecture whose names differ).
    """
    one_of("constraint.modules", scope, SCOPES)
    names = {id(module): name for name, module in model.named_modules()}
    for index, layer in enumerate(decoder_layers(model)):
        for kind in SCOPES[scope]:
            for path in paths_in(layer, PROJECTIONS[kind]):
                if path in OF_EXPERTS:
                    yield from _of_experts(layer, path.rpartition(".")[2], Site(index, kind), names)
                    continue
                try:
                    module = layer.get_submodule(path)
                except AttributeError as error:
                    raise LabError(f"{type(model).__name__} has no {path} in layer {index}") from error
                yield Matrix(Site(index, kind), f"{names[id(module)]}.weight", module)


def _of_experts(layer: torch.nn.Module, parameter: str, site: Site, names: dict[int, str]) -> Iterator[Matrix]:
    """Yield the matrices of a layer's experts that one parameter holds."""
    found = experts_in(layer)
    name = f"{names[id(found)]}.{parameter}"
    while hasattr(found, "base_layer") and found.parameter_name != parameter:
        found = found.base_layer
    for expert in range(_plain(found).num_experts):
        yield Matrix(Site(site.layer, site.kind, expert), name, found)


def stored(name: str, names: Container[str]) -> str | None:
    """Return the name that a file has for a parameter, None if it has none.

    It is the same, or without its first part where the inner model was saved, as GPT-2's is.
    """
    return next((each for each in (name, name.partition(".")[2]) if each in names), None)


def depth_to_layer(depth: float, n_layers: int) -> int:
    """Return the index of the layer at a relative ``depth`` in [0, 1): ``int(depth * n_layers)``."""
    return min(int(depth * n_layers), n_layers - 1)
