"""What a defence in another trainer cannot do without, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cwac_lab.core.errors import ConfigError, LabError
from cwac_lab.defenses.cwac.sae import latents
from cwac_lab.defenses.cwac.sae.latents import FeatureSpec, LayerFeatures
from cwac_lab.defenses.interface import Composite, Defense, Requirements, overrides, parts_of
from cwac_lab.defenses.together import check_together
from cwac_lab.integrations.callback import DefenseCallback
from cwac_lab.models.adapters import has_adapters
from cwac_lab.models.few_bits import in_few_bits
from cwac_lab.models.sites import decoder_layers, depth_to_layer

# How far residuals of the same weights may be apart, relative to their norm: held in bfloat16, and in 4 bits.
ROUNDED, IN_FEW_BITS = 0.05, 0.5


def check_trainer(trainer: Any, defense: Defense) -> None:
    """Check that a defence's hooks can be called where a trainer calls them.

    Raises:
        ConfigError: If a setting is in the way.
        LabError: If the trainer has trained, or is under a defence.
    """
    check_together(defense.parts if isinstance(defense, Composite) else {})
    arguments = trainer.args
    if any(isinstance(each, DefenseCallback) for each in trainer.callback_handler.callbacks):
        raise LabError("protect: the trainer is under a defence (accepted: one call, several parts: named('[a,b]'))")
    if trainer.state.global_step:
        raise LabError("protect: the trainer has trained (accepted: a new one, whose model is at its start)")
    if trainer.model_init is not None:
        raise ConfigError("protect: model_init", trainer.model_init, "model=...: train() would make another one")
    if overrides(defense, "wrap_dataset"):
        raise ConfigError("protect: defense", "adds rows", "a defence without rows of its own; add them to the dataset")
    if arguments.fp16:
        raise ConfigError("protect: fp16", True, "bf16 or float32: gradients must not be scaled")
    if arguments.world_size > 1:
        raise ConfigError("protect: world_size", arguments.world_size, "1 process")
    if arguments.n_gpu > 1:
        raise ConfigError("protect: n_gpu", arguments.n_gpu, "1 GPU; CUDA_VISIBLE_DEVICES=0 leaves one")
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise ConfigError("protect: deepspeed or fsdp", True, "neither: the defence reads whole weights and gradients")
    if arguments.load_best_model_at_end and any(part.settles_once for part in parts_of(defense)):
        raise ConfigError("protect: load_best_model_at_end", True, "False: the defence changes weights at the end once")
    if overrides(defense, "begin") and not hasattr(trainer.train_dataset, "__len__"):
        kind = type(trainer.train_dataset).__name__
        raise ConfigError("protect: train_dataset", kind, "one with a length: the defence asks the start for all rows")


def check_model(needs: Requirements, model: Any) -> None:
    """Check that a defence holds for what trains in a model: all weights, or plain LoRA that begins at zero.

    Raises:
        ConfigError: If it does not.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    exact = needs.exact_projection or needs.float32_weights
    if not has_adapters(model):
        if exact and model.dtype != torch.float32:
            raise ConfigError("protect: dtype", model.dtype, "float32 weights: others round what is put there away")
        return
    if needs.whole_update:
        raise ConfigError("protect: model", "with adapters", "plain weights: the defence cannot change factors")
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        if not isinstance(layer, LoraLayer):
            raise ConfigError("protect: peft_config", type(layer).__name__, "LoRA")
        if any(layer.use_dora.values()):
            raise ConfigError("protect: use_dora", True, "plain LoRA: of DoRA the update is not B A")
        if len(layer.active_adapters) != 1 or layer.merged:
            raise ConfigError("protect: active_adapters", list(layer.active_adapters), "one, not merged")
        if any(bool(factor.weight.any()) for factor in layer.lora_B.values()):
            raise ConfigError("protect: lora_B", "not zero", "new adapters: the start is the model without them")
        factors = [factor.weight for factor in layer.lora_A.values()]
        if exact and any(factor.dtype != torch.float32 for factor in factors):
            raise ConfigError("protect: dtype of lora_A", factors[0].dtype, "float32 factors (autocast_adapter_dtype)")
    others = [name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name]
    if others:
        raise ConfigError("protect: what trains", others[0], "LoRA's factors alone: the rest is no part of B A")
    if needs.base_weights and any(in_few_bits(layer.base_layer) for layer in layers):
        accepted = "weights in bfloat16 or float32: what 4 or 8 bits round is larger than what alignment did"
        raise ConfigError("protect: model", "quantised", accepted)


def check_unasked(needs: Requirements) -> None:
    """Check that a defence needs no answers of the start, which ``protect`` does not ask.

    Raises:
        ConfigError: If it does.
    """
    if needs.subspace is not None and needs.subspace.answers != "none":
        raise ConfigError("answers", needs.subspace.answers, "none with protect, which asks the model nothing")
    if needs.own_refusals:
        raise ConfigError("answer_tokens", "above 0", "0 with protect, which asks the model nothing")


def check_given(needs: Requirements, given: set[str]) -> None:
    """Check that what a defence needs is given, by the names of ``protect``'s arguments.

    Raises:
        ConfigError: If something is not.
    """
    asked = {
        "harmful": needs.reference_prompts,
        "benign": any(spec is not None and spec.held_on != "harmful" for spec in (needs.subspace, needs.features)),
        "features": needs.features is not None,
        "base_weight": needs.base_weights,
    }
    for name, needed in asked.items():
        if needed and name not in given:
            raise ConfigError(f"protect: {name}", None, "a value: the defence needs it")


def read_features(folder: Path, spec: FeatureSpec, model: Any) -> Sequence[LayerFeatures]:
    """Read the features of an activation constraint, made for a model as it is.

    Raises:
        ConfigError: If they are of other layers, of another size or number, or of another model.
    """
    found = latents.load(folder)
    n_layers = len(decoder_layers(model))
    layers = sorted({depth_to_layer(depth, n_layers) for depth in spec.depths})

    def refuse(value: object, accepted: object) -> None:
        raise ConfigError("protect: features", f"{folder} ({value})", f"{accepted}, as cwac_lab.prepare makes them")

    if [features.layer for features in found] != layers:
        refuse(f"layers {[features.layer for features in found]}", f"those of layers {layers}")
    for features in found:
        width = model.get_input_embeddings().weight.shape[1]
        if features.weight.shape[0] != width:
            refuse(f"width {features.weight.shape[0]}", f"those of a model of width {width}")
        if len(features.latents) != spec.n_latents:
            refuse(f"{len(features.latents)} latents", f"n_latents={spec.n_latents}")
        if features.signature is None:
            refuse("older than the mark of their model", "the folder removed and made anew")
            continue
        apart = latents.signature(model, features.layer) - features.signature
        few = any(in_few_bits(module) for module in model.modules())
        away = float(apart.norm() / features.signature.norm())
        if not away <= (IN_FEW_BITS if few else ROUNDED):
            refuse(f"its model's residuals are {away:.0%} off this one's", "those of this model at its start")
    return found
