"""LoRA (Hu et al. 2022) by PEFT: attached to a model in place, merged into its weights after training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from cwac_lab.errors import in_range, one_of
from cwac_lab.models.sites import PROJECTIONS, SCOPES

METHODS = ("full", "lora")
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
            ``W = W_0 + alpha / r B A``, merged at the end.
        rank: r.
        alpha: Numerator of the scale ``alpha / r``.
        modules: Linear layers with factors: ``query_value`` or a scope of ``models.sites``.
    """

    method: str = "full"
    rank: int = 16
    alpha: float = 32.0
    modules: str = "all_linear"

    def __post_init__(self) -> None:
        """Check the fields."""
        one_of("method", self.method, METHODS)
        in_range("rank", self.rank, 1)
        in_range("alpha", self.alpha, 0, open_low=True)
        one_of("modules", self.modules, TARGETS)


def attach(model: Any, config: TuningConfig, seed: int) -> Callable[[], object]:
    """Give a model its adapters, in place; with ``method=full`` it stays as it is.

    B starts at zero, so that the model computes what it did; A is drawn with the seed. Only the factors train.

    Returns:
        What adds ``alpha / r B A`` to the weights, in place, and leaves plain linear layers.
    """
    if config.method == "full":
        return lambda: None
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=[path.rpartition(".")[2] for path in TARGETS[config.modules]],
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LoraModel(model, lora, "default").merge_and_unload


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
