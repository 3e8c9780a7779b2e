"""A LoRA adapter on disk, in PEFT's format: what it is of, whether it is plain, and its merge into a model.

``W = W_0 + s B A`` for linear layers (Hu et al. 2022), and for each expert of a mixture, with ``s = alpha / r``, or
``alpha / sqrt(r)`` where it is rank stabilised (Kalajdzievski 2023); r and alpha may differ from layer to layer.
Factors are read from safetensors only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

from cwac_lab.core.cache import file_digest
from cwac_lab.core.errors import ConfigError, LabError, MissingAsset
from cwac_lab.models import folder as folders
from cwac_lab.models.sites import EXPERTS, OF_EXPERTS, experts_in, is_linear, is_turned, lefts, rights
from cwac_lab.models.sources import Source, source

SETTINGS, FACTORS = folders.ADAPTER, "adapter_model.safetensors"
PREFIX = "base_model.model."
_FACTOR = re.compile(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight")
# Settings that leave an adapter what the formula says, whatever they hold; all others must be off.
_PLAIN = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_dropout"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "bias"),
    *("init_lora_weights", "megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying"),
    *("eva_config", "velora_config", "target_parameters"),
}
# How factors may have been drawn; others (PiSSA, OLoRA, LoftQ) change the weights beside them.
_DRAWN = (None, True, False, "gaussian", "orthogonal", "eva")
_OTHER_MODEL = "accepted: the model it was made of"


def settings(folder: Path) -> dict[str, Any]:
    """Return the settings of an adapter that is plain LoRA.

    Raises:
        MissingAsset: If it is of another kind, or its factors are not in safetensors.
    """
    held = folders.read(folder, SETTINGS)
    kind, file = held.get("peft_type"), folder / SETTINGS
    on = {name: held[name] for name in sorted(held.keys() - _PLAIN) if held[name]}
    if held.get("bias", "none") != "none":
        on["bias"] = held["bias"]
    if held.get("init_lora_weights") not in _DRAWN:
        on["init_lora_weights"] = held["init_lora_weights"]
    wrong = {"peft_type": kind} if kind != "LORA" else on
    if wrong:
        told = ", ".join(f"{name}={value}" for name, value in wrong.items())
        raise MissingAsset(f"{file}: {told}; accepted: LoRA without it, or a model: {folders.merging(folder)}")
    if not isinstance(held.get("r"), int) or not isinstance(held.get("lora_alpha"), int | float):
        raise MissingAsset(f"{file}: r={held.get('r')}, lora_alpha={held.get('lora_alpha')}; accepted: numbers")
    return held


def factors(folder: Path) -> Path:
    """Return the file with an adapter's factors.

    Raises:
        MissingAsset: If it is not there.
    """
    if (folder / FACTORS).is_file():
        return folder / FACTORS
    pickled = [file.name for ending in ("bin", "pt", "pth") for file in sorted(folder.glob(f"*.{ending}"))]
    what = f"pickled weights are not loaded ({', '.join(pickled)})" if pickled else "its factors are not there"
    save = "model.save_pretrained(folder, safe_serialization=True) of PEFT writes it"
    raise MissingAsset(f"no {FACTORS} in {folder}: {what}; accepted: {FACTORS} ({save})")


def base_of(adapter: Source, held: Mapping[str, Any]) -> Source:
    """Return where the model is that an adapter names as its base.

    Raises:
        ConfigError: If it names none, or one that is not here.
    """
    named, key = held.get("base_model_name_or_path"), f"base_model_name_or_path of {adapter.key}={adapter.name}"
    how = f"name its base by model.path=BASE model.adapter={adapter.name}"
    if not named:
        raise ConfigError(key, named, f"a model; {how}")
    try:
        found = source(key, str(named))
    except ConfigError as error:
        raise ConfigError(key, named, f"{error.accepted}; or {how}") from None
    return replace(found, revision=held.get("revision") or "main", instead=how)


def _pairs(folder: Path, held: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the factors A (r, d) and B (m, r) by the name of their layer.

    Raises:
        LabError: If there are other tensors, or half a pair.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in held.items():
        fits = _FACTOR.fullmatch(name)
        if fits is None:
            raise LabError(f"{folder / FACTORS}: {name} is no factor; accepted: {PREFIX}LAYER.lora_A.weight and lora_B")
        found.setdefault(fits[1], {})[fits[2]] = tensor
    halves = [f"{layer}.lora_{side}" for layer, sides in found.items() for side in "AB" if side not in sides]
    if halves or not found:
        raise LabError(f"{folder / FACTORS} lacks {', '.join(halves[:3]) or 'factors'}; accepted: pairs lora_A, lora_B")
    return {layer: (sides["A"], sides["B"]) for layer, sides in sorted(found.items())}


def _of(settings: Mapping[str, Any], name: str, layer: str) -> float:
    """Return a setting of a layer, which may have its own in ``rank_pattern`` or ``alpha_pattern``."""
    from peft.utils.other import get_pattern_key

    pattern = settings.get({"r": "rank_pattern", "lora_alpha": "alpha_pattern"}[name]) or {}
    found: float = pattern.get(get_pattern_key(list(pattern), layer), settings[name])
    return found


def scale(settings: Mapping[str, Any], layer: str) -> float:
    """Return what ``B A`` of a layer is multiplied by."""
    rank = _of(settings, "r", layer)
    return _of(settings, "lora_alpha", layer) / (math.sqrt(rank) if settings.get("use_rslora") else rank)


@dataclass(frozen=True)
class Place:
    """Where factors belong: a parameter by its name, of so many experts, 0 for a linear layer, turned (d, m) or not."""

    name: str
    parameter: Tensor
    experts: int = 0
    turned: bool = False

    def update(self, a: Float[Tensor, "R d"], b: Float[Tensor, "m R"], *, by_rank: bool) -> Tensor:
        """Return ``B A`` in float64, in the shape of the parameter; ``by_rank`` adds up one rank after the other."""
        left, right = b.double(), a.double()
        if self.experts:
            left, right = lefts(left, self.experts), rights(right, self.experts)
        if not by_rank:
            found = left @ right
        else:
            found = torch.zeros(*left.shape[:-1], right.shape[-1], dtype=torch.float64)
            for place in range(left.shape[-1]):
                found += left[..., place, None] * right[..., None, place, :]
        return found.T if self.turned else found


def _place(model: Any, folder: Path, layer: str, told: Mapping[str, Any]) -> Place:
    """Return where the factors belong that an adapter names by a layer.

    Of experts PEFT puts the factors of one parameter around those of another, in the order of the parameters.

    Raises:
        LabError: If the model has no such layer, or one of another kind.
    """
    name = layer.removesuffix(".base_layer")
    try:
        module = model.get_submodule(name)
        around = model.get_submodule(name.removesuffix(f".{EXPERTS}"))
    except AttributeError:
        raise LabError(f"{folder}: the model has no layer {layer}; {_OTHER_MODEL}") from None
    asked = [path.rpartition(".")[2] for path in OF_EXPERTS if _is_asked(path, told)]
    if name.endswith(EXPERTS) and asked and experts_in(around) is module:
        parameter = asked[0 if name != layer else -1]
        return Place(f"{name}.{parameter}", getattr(module, parameter), module.num_experts)
    if not is_linear(module) or name != layer:
        raise LabError(f"{folder}: {layer} is a {type(module).__name__}; accepted: factors of linear layers")
    if module is model.get_output_embeddings() and model.config.tie_word_embeddings:
        raise LabError(f"{folder}: {layer} is tied to the embeddings, which would move too; accepted: other layers")
    return Place(layer, module.weight, turned=is_turned(module))


def _is_asked(path: str, told: Mapping[str, Any]) -> bool:
    """Tell whether an adapter's settings name a parameter."""
    return any(f".{path}".endswith(f".{name}") for name in told.get("target_parameters") or ())


def check(model: Any, folder: Path, held: Mapping[str, Tensor] | None = None) -> dict[str, tuple[Tensor, Tensor]]:
    """Check that an adapter's factors are those of layers of a model, which may be on the meta device.

    Args:
        model: A causal language model.
        folder: The adapter's.
        held: Its factors; None reads their shapes only.

    Returns:
        The factors A (r, d) and B (m, r) by the name of their layer; of E experts together (r E, d) and (m, r E).

    Raises:
        LabError: If it is of another model, or not plain LoRA in linear layers.
    """
    told = folders.read(folder, SETTINGS)
    pairs = _pairs(folder, folders.headers([factors(folder)]) if held is None else held)
    names = set()
    for layer, (a, b) in pairs.items():
        place = _place(model, folder, layer, told)
        names.add(place.name)
        rank, shape = _of(told, "r", place.name) * (place.experts or 1), tuple(place.parameter.shape)
        if len(a) != rank or b.shape[1] != rank:
            raise LabError(f"{folder}: factors of {layer} have rank {len(a)} and {b.shape[1]}; accepted: {rank}")
        wanted = (a.shape[1], len(b)) if place.turned else (len(b), a.shape[1])
        if shape[-2:] != wanted:
            raise LabError(
                f"{folder}: the update of {layer} is of shape {wanted}, the model's is {shape}; {_OTHER_MODEL}"
            )
    _check_targets(model, folder, told, names)
    return pairs


def _check_targets(model: Any, folder: Path, held: Mapping[str, Any], names: Collection[str]) -> None:
    """Check that all that the settings name has factors: PEFT would draw those that are missing.

    Raises:
        LabError: If not.
    """
    from peft.tuners.tuners_utils import check_target_module_exists

    lost = {}
    if targets := held.get("target_modules"):
        keys = ("exclude_modules", "layers_to_transform", "layers_pattern")
        asked = SimpleNamespace(target_modules=targets, target_parameters=None, **{key: held.get(key) for key in keys})
        linear = (name for name, module in model.named_modules() if is_linear(module))
        lost["target_modules"] = [name for name in linear if check_target_module_exists(asked, name) in (True,)]
    if asked_parameters := held.get("target_parameters"):
        found = [name for name, _ in model.named_parameters() if _is_asked(name, held)]
        lost["target_parameters"] = found or list(asked_parameters)
    for key, wanted in lost.items():
        missing = [name for name in wanted if name not in names]
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        if missing:
            told = f"no factors of {missing[0]}{more}, which {key} names"
            raise LabError(f"{folder}: {told}; accepted: those of all of them")


@torch.no_grad()
def add(model: Any, folder: Path, *, by_rank: bool = True) -> None:
    """Add an adapter's update to the weights of a model, in place: in float64, rounded once.

    Args:
        model: A model in float32.
        folder: Folder of an adapter.
        by_rank: Add up one rank after the other, element by element: no library chooses the order of the sums, and
            with factors in bfloat16 the result is the same bits on every machine. A product is faster.

    Raises:
        LabError: If it is of another model.
    """
    told = folders.read(folder, SETTINGS)
    for layer, (a, b) in check(model, folder, load_file(factors(folder))).items():
        place = _place(model, folder, layer, told)
        weight, update = place.parameter, place.update(a, b, by_rank=by_rank)
        weight.copy_(weight.double() + scale(told, place.name) * update.to(weight.device))


def digest(folder: Path) -> str:
    """Return the SHA-256 over the settings and factors of an adapter."""
    return file_digest([folder / SETTINGS, factors(folder)])
