"""Factors beside frozen weights, by PEFT: attached to a model in place, merged into its weights after training.

LoRA (Hu et al. 2022) trains both factors. With ``null_space`` the rows of A are directions that a constraint leaves
free, A stays as it is, and B trains: the frozen A of LoRA-Null (Tang et al. 2025, arXiv 2503.02659).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cwac_lab.core.errors import ConfigError, LabError, in_range, one_of
from cwac_lab.core.linalg import full_float32
from cwac_lab.models.few_bits import dense, in_few_bits, plain, quantized
from cwac_lab.models.sites import OF_EXPERTS, PROJECTIONS, SCOPES, Matrix, decoder_layers, is_turned, paths_in

METHODS = ("full", "lora", "null_space")
SAVED = ("merged", "adapter", "both")
# What the frozen weights beside the factors are held in, and what they are loaded as.
BASES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "nf4": torch.bfloat16}
# The scopes of the weight constraint, and what the paper's family of baselines adapts.
TARGETS = {
    "query_value": ("self_attn.q_proj", "self_attn.v_proj"),
    **{scope: tuple(path for kind in kinds for path in PROJECTIONS[kind]) for scope, kinds in SCOPES.items()},
}


@dataclass
class TuningConfig:
    """The ``tuning`` group: what is trained.

    Attributes:
        method: ``full``: the weights themselves; ``lora``: low-rank factors B (m, r) and A (r, d) beside frozen ones,
            ``W = W_0 + alpha / r B A``, merged at the end; ``null_space``: ``W = W_0 + sqrt(d / c) B U^T``, where the
            columns of U (d, c) are directions that the constraint leaves free, and B (m, c) trains; not in experts.
            With this scale a step in which every number moves by the rate is as long as with ``full``, unprojected.
        rank: Rank r of LoRA's factors.
        alpha: Numerator of the scale ``alpha / r`` of LoRA.
        modules: Linear layers with factors: ``query_value`` or a scope of ``models.sites``.
        base: What W_0 is held in, one of ``BASES``; the factors are in float32, and so is the merged model. ``nf4``
            (QLoRA, Dettmers et al. 2023, by bitsandbytes) concerns the adapted layers, the rest is in bfloat16.
        save: What is saved of a run with factors: the ``merged`` model, the ``adapter`` in PEFT's own format, or
            ``both``.
        free_directions: With ``null_space`` the most columns that U has, the free directions that hold most of the
            training rows' inputs; None: all that are free.
    """

    method: str = "full"
    rank: int = 16
    alpha: float = 32.0
    modules: str = "all_linear"
    base: str = "float32"
    save: str = "merged"
    free_directions: int | None = None

    def __post_init__(self) -> None:
        """Check the fields."""
        one_of("method", self.method, METHODS)
        in_range("rank", self.rank, 1)
        if self.free_directions is not None:
            in_range("free_directions", self.free_directions, 1)
        in_range("alpha", self.alpha, 0, open_low=True)
        one_of("modules", self.modules, TARGETS)
        one_of("base", self.base, BASES)
        if not self.adapts and self.save != SAVED[0]:
            raise ConfigError("save", self.save, f"{SAVED[0]}, or with factors (tuning=lora) {' | '.join(SAVED[1:])}")
        one_of("save", self.save, SAVED)
        if self.base == "nf4" and find_spec("bitsandbytes") is None:
            raise ConfigError("base", "nf4", "float32 | bfloat16, or bitsandbytes: pip install 'cwac-lab[qlora]'")

    @property
    def adapts(self) -> bool:
        """Whether factors beside the weights are trained, not the weights themselves."""
        return self.method != "full"

    @property
    def saved(self) -> tuple[str, ...]:
        """Folders of a run with what is saved of it, in this order."""
        return {"merged": ("model",), "adapter": ("adapter",), "both": ("model", "adapter")}[self.save]

    @property
    def title(self) -> str:
        """What is trained, in words."""
        if self.method == "full":
            return "all weights that the constraint leaves free"
        if self.method == "null_space":
            most = "all" if self.free_directions is None else f"up to {self.free_directions}"
            return f"{most} free directions of {self.modules}, beside weights in {self.base}"
        return f"LoRA of rank {self.rank} in {self.modules}, beside weights in {self.base}"

    @property
    def dtype(self) -> torch.dtype | None:
        """The type that weights are loaded in; None: as the trainer's precision says."""
        return BASES[self.base] if self.adapts and self.base != "float32" else None


def targets(model: Any, modules: str) -> list[str]:
    """Return the names that PEFT finds the linear layers of a scope by; a layer that joins several has one of its own.

    It is the last part of the path, or all of it where others end alike (GPT-2's ``c_proj``).

    Args:
        model: The model; its layers may lack some of them, which others have.
        modules: A key of ``TARGETS``.
    """
    found: dict[str, None] = {}
    for layer in decoder_layers(model):
        lasts = [name.rpartition(".")[2] for name, _ in layer.named_modules()]
        paths = [path for path in paths_in(layer, TARGETS[modules]) if path not in OF_EXPERTS]
        for path in paths:
            last = path.rpartition(".")[2]
            found[path if lasts.count(last) > 1 else last] = None
    return list(found)


def expert_targets(model: Any, modules: str) -> list[str]:
    """Return the paths of the experts' parameters in a scope, as ``targets`` does those of layers."""
    paths = (path for layer in decoder_layers(model) for path in paths_in(layer, TARGETS[modules]))
    return list(dict.fromkeys(path for path in paths if path in OF_EXPERTS))


def peft_settings(
    model: Any, config: TuningConfig, shapes: Mapping[str, Sequence[int]] | None = None
) -> dict[str, Any]:
    """Return what PEFT is told of a model's factors: rank, scale, and where they are.

    Args:
        model: The model, with PEFT's layers in it or without.
        config: What is trained.
        shapes: Of A (c, d) in layers by name, where each has its own, and the scale ``sqrt(d / c)``; where c is 0
            there are no factors.
    """
    found: dict[str, Any] = {"target_modules": targets(model, config.modules)}
    if shapes is None:
        found |= {"r": config.rank, "lora_alpha": config.alpha}
    else:
        ranks = {name: rank for name, (rank, _) in shapes.items() if rank}
        alphas = {name: math.sqrt(rank * shapes[name][1]) for name, rank in ranks.items()}
        found |= {"r": 1, "lora_alpha": 1, "rank_pattern": ranks, "alpha_pattern": alphas}
        found["exclude_modules"] = [name for name in shapes if name not in ranks] or None
    if experts := expert_targets(model, config.modules):
        found["target_parameters"] = experts
    if any(map(is_turned, decoder_layers(model).modules())):
        found["fan_in_fan_out"] = True
    return found


def attach(
    model: Any, config: TuningConfig, seed: int, free: Mapping[str, Float[Tensor, "d c"]] | None = None
) -> Callable[[], object]:
    """Give a model its adapters, in place; with ``method=full`` it stays as it is.

    B starts at zero, so that the model computes what it did. LoRA's A is drawn with the seed. Only factors train.

    Args:
        model: The model.
        config: What is trained.
        seed: Seed of A.
        free: With ``method=null_space``, U by the name of each layer: A is its transpose, and does not train.

    Returns:
        What adds ``alpha / r B A`` to the weights, in place, and leaves plain linear layers.

    Raises:
        LabError: If the constraint leaves no direction free.
    """
    if not config.adapts:
        return lambda: None
    shapes = None if config.method == "lora" else {name: basis.T.shape for name, basis in (free or {}).items()}
    if shapes is not None and not any(rank for rank, _ in shapes.values()):
        raise LabError("the constraint leaves nothing to train (accepted: a lower energy or rank)")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it where it is; it misses a faster kernel
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    lora = LoraConfig(**peft_settings(model, config, shapes))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = LoraModel(model, lora, "default")
    for name, layer in list(model.named_modules()):
        if not hasattr(layer, "lora_A"):
            continue
        layer.lora_A.float()
        layer.lora_B.float()
        if shapes is not None and free is not None:
            a = layer.lora_A["default"].weight.requires_grad_(False)
            a.data.copy_(free[name].T)
        if config.base == "nf4":
            layer.base_layer = quantized(layer.base_layer)

    return lambda: merge(adapted)


def merge(adapted: Any) -> Any:
    """Add ``alpha / r B A`` to the weights in float32, in place, whatever they are held in.

    bfloat16 or 4 bits would round the update, and with it a constraint on it.

    Args:
        adapted: PEFT's ``LoraModel``.

    Returns:
        The plain model in float32.
    """
    from peft.tuners.lora import Linear

    model = adapted.model
    for layer in _layers(model):
        if in_few_bits(layer.base_layer):
            layer.__class__ = Linear  # PEFT's own for few bits would round the sum to them
    for name, module in list(model.named_modules()):
        if in_few_bits(module):
            model.set_submodule(name, plain(module))
    if getattr(model, "hf_quantizer", None) is not None:  # as transformers loaded it
        model.hf_quantizer.remove_quantization_config(model)
    model.float()
    for layer in _layers(model):
        told = vars(layer).get("when_merged")
        before = _own(layer).detach().clone() if told else None
        with full_float32(model.device):  # a rounded B A would have a part in what a projected A has none in
            layer.merge()
        if told:
            told(before, _own(layer).detach())
    return adapted.unload()


@torch.no_grad()
def factors(model: Any) -> dict[str, Tensor]:
    """Return the factors A (r, d) and B (m, r) that a model computes with, by PEFT's names within the plain model.

    A constraint's projection of a factor is part of it.
    """
    found = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            found[f"{name}.lora_A.weight"] = layer.lora_A["default"].weight.detach()
            found[f"{name}.lora_B.weight"] = layer.lora_B["default"].weight.detach()
    return found


def _own(layer: Any) -> Tensor:
    """Return the parameter that a PEFT layer's factors are of: a layer's weight, or that of all its experts."""
    found: Tensor = layer.get_param() if hasattr(layer, "get_param") else layer.base_layer.weight
    return found


def when_merged(layer: Any, told: Callable[[Tensor, Tensor], None]) -> None:
    """Have a call told the parameter that a PEFT layer's factors are of before and after it is merged, in float32."""
    layer.when_merged = told


def held_weight(linear: Matrix) -> Float[Tensor, "m d"]:
    """Return a new copy of a matrix in float32, as it is held, without what adapters that are not merged add."""
    if linear.site.expert is not None:
        return linear.weight.detach().to(torch.float32, copy=True)
    return linear.of(dense(linear.module))


def _layers(model: Any) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def has_adapters(model: Any) -> bool:
    """Return whether a model has adapters that are not merged."""
    return any(not layer.merged for layer in _layers(model))


@contextmanager
def without_adapters(model: Any) -> Iterator[Any]:
    """Let a model compute as before its adapters; what trains is the same afterwards (PEFT would thaw all factors)."""
    layers = _layers(model)
    trains = [(parameter, parameter.requires_grad) for layer in layers for parameter in layer.parameters()]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield model
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, flag in trains:
            parameter.requires_grad_(flag)
