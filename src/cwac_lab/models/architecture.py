"""Whether an architecture has what a run works on, told by its modules on the meta device, not by its name."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cwac_lab.core.errors import ConfigError, LabError
from cwac_lab.models.adapters import TARGETS
from cwac_lab.models.answers import logits_of
from cwac_lab.models.sites import (
    EXPERTS,
    FAMILIES,
    OF_EXPERTS,
    SCOPES,
    decoder,
    decoder_layers,
    is_linear,
    is_turned,
    layers_of,
    linears,
    paths_in,
    stored,
)

# Layers whose keys and values of an opening serve all rows that begin with it; others keep a state of their own.
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention", "sparse", "dense"}


@dataclass(frozen=True)
class Scope:
    """Linear layers that a run works on by name.

    Attributes:
        key: The setting that asks for them.
        value: What it says.
        name: Which layers, a key of ``sites.SCOPES``.
        without: The setting that does without them.
        stored: Whether their start is read from the file, by the names of the model.
        experts: Whether they may be those of experts.
        rank: How many directions of each input are protected, where that is set and nothing else trains.
    """

    key: str
    value: str
    name: str
    without: str
    stored: bool = True
    experts: bool = True
    rank: int | None = None


@dataclass(frozen=True)
class Use:
    """What a run does with a model, as far as the model must allow it.

    Attributes:
        scopes: Linear layers that it works on by name.
        adapted: The scope that gets factors (LoRA), None without.
        base: What the weights beside the factors are held in.
        max_length: The most tokens of a conversation; None where only its weights are read.
        new_tokens: The most tokens that are generated after a prompt.
        chat_template: A template in the place of the tokenizer's.
        sharded: Whether its weights are divided among processes.
    """

    scopes: tuple[Scope, ...] = ()
    adapted: str | None = None
    base: str = "float32"
    max_length: int | None = None
    new_tokens: int = 0
    chat_template: str | None = None
    sharded: bool = False


def check(model: Any, use: Use) -> None:
    """Check that a model on the meta device has what a run works on.

    Raises:
        LabError: One line that names the architecture, what it lacks, and what is accepted.
    """
    _check_decoder(model)
    _check_head(model)
    for scope in use.scopes:
        _check_scope(model, scope)
    if use.sharded:
        _check_sharded(model, {*(scope.name for scope in use.scopes), *([use.adapted] if use.adapted else [])})
    if use.adapted is not None:
        _check_factors(model, use.adapted, use.base)
    if use.max_length is not None:
        _check_positions(model, use.max_length, use.new_tokens)


def _title(model: Any) -> str:
    return f"{type(model).__name__} ({model.config.model_type})"


def _check_decoder(model: Any) -> None:
    """Check that a model is a stack of attention layers between embeddings and a head.

    Raises:
        LabError: If not: other names, layers that keep a state (convolutions, state spaces), several stacks.
    """
    stack = decoder(model)
    layers = layers_of(stack)
    if not isinstance(layers, torch.nn.ModuleList) or not len(layers):
        held = ", ".join(name for name, _ in stack.named_children())
        lacks = "no list of decoder layers called layers or h"
        raise _refused(model, f"its {type(stack).__name__} has {lacks} (it has {held})")
    others = set(getattr(stack.config, "layer_types", None) or ()) - _ATTENTION
    for index, layer in enumerate(layers):
        if not any("attn" in name or "attention" in name for name, _ in layer.named_children()):
            others.add(f"layer {index}: {', '.join(name for name, _ in layer.named_children())}")
    if others or getattr(model, "_is_stateful", False):
        raise _refused(
            model, f"it has layers other than attention ({', '.join(sorted(others)) or 'they keep a state'})"
        )
    if model.get_output_embeddings() is None:
        raise _refused(model, "it has no output embeddings")


def _refused(model: Any, reason: str) -> LabError:
    accepted = f"decoder layers with attention, as in {FAMILIES}"
    return LabError(f"model architecture {_title(model)}: {reason}; accepted: {accepted}")


def _check_head(model: Any) -> None:
    """Check that logits are what the head makes of the last states, by giving both some that are made up.

    Raises:
        LabError: If they are not (Cohere scales them).
    """
    from transformers.modeling_outputs import BaseModelOutputWithPast

    stack, own, draw = decoder(model), model.get_output_embeddings(), torch.Generator().manual_seed(0)
    try:
        states = torch.randn(1, 1, stack.config.hidden_size, generator=draw)
        head = torch.nn.Linear(states.shape[-1], 8, bias=False)
        head.weight = torch.nn.Parameter(torch.randn(head.weight.shape, generator=draw), requires_grad=False)
        model.set_output_embeddings(head)
        stack.forward = lambda *_, **__: BaseModelOutputWithPast(last_hidden_state=states)
        wanted, found = model(input_ids=torch.ones(1, 1, dtype=torch.long)).logits, logits_of(model, states)
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return  # more than a stack and a head, told once its weights are there (``loading.load_model``)
    finally:
        model.set_output_embeddings(own)
        vars(stack).pop("forward", None)
    if not torch.allclose(wanted, found, rtol=1e-4, atol=1e-5):
        raise _refused(model, "its logits are not what its head makes of the last states, but scaled or changed")


def _lacks(layers: Sequence[torch.nn.Module], paths: Sequence[str], *, experts: bool = True) -> dict[str, int]:
    """Return which paths are no linear layer, each with the first decoder layer where that is so.

    ``experts`` takes the parameters of experts for linear layers.
    """
    found: dict[str, int] = {}
    for index, layer in enumerate(layers):
        modules = dict(layer.named_modules())
        for path in paths_in(layer, paths, experts=experts):
            if path not in OF_EXPERTS and not is_linear(modules.get(path)):
                found.setdefault(path, index)
    return found


def _others(layer: torch.nn.Module) -> list[str]:
    """Return the modules of a decoder layer that hold matrices which no scope names."""
    known = {path for paths in TARGETS.values() for path in paths}
    held = {name.rpartition(".")[0] for name, parameter in layer.named_parameters() if parameter.ndim > 1}
    return sorted(held - known)


def _told(model: Any, lacking: dict[str, int]) -> str:
    first = min(lacking.values())
    instead = ", ".join(_others(decoder_layers(model)[first])[:4]) or "no others"
    return f"{_title(model)} lacks linear layers {', '.join(lacking)} in layer {first} (it has {instead})"


def _check_scope(model: Any, scope: Scope) -> None:
    lacking = _lacks(list(decoder_layers(model)), TARGETS[scope.name], experts=scope.experts)
    if lacking:
        fitting = _fitting(model, SCOPES, experts=scope.experts) if scope.value in SCOPES else []
        accepted = " | ".join([*fitting, scope.without, f"another architecture ({FAMILIES})"])
        raise ConfigError(scope.key, scope.value, f"{accepted}; {_told(model, lacking)}")
    found = list(linears(model, scope.name)) if scope.rank is not None else []
    widest = max((matrix.width for matrix in found if matrix.site.expert is None), default=0)
    if scope.rank is not None and scope.rank >= widest and all(matrix.site.expert is None for matrix in found):
        key = f"{scope.key.rpartition('.')[0]}.rank"
        raise ConfigError(key, scope.rank, f"below {widest}, the width of the widest input of {scope.name}")


def _fitting(model: Any, scopes: Iterable[str], *, experts: bool = True) -> list[str]:
    """Return the scopes of which a model has all linear layers."""
    return [name for name in scopes if not _lacks(list(decoder_layers(model)), TARGETS[name], experts=experts)]


def _check_sharded(model: Any, scopes: set[str]) -> None:
    """Check that what a run works on by name are linear layers, whose rows are what processes divide.

    Raises:
        ConfigError: If not (GPT-2, experts).
    """
    paths = [path for name in scopes for path in TARGETS[name]]
    for layer in decoder_layers(model):
        for path in paths_in(layer, paths):
            if not isinstance(dict(layer.named_modules()).get(path), torch.nn.Linear):
                held = f"{path} of {_title(model)} is no linear layer, whose rows could be divided"
                raise ConfigError("trainer.strategy", "fsdp", f"ddp; {held}")


def _check_factors(model: Any, adapted: str, base: str) -> None:
    """Check that all linear layers that the settings name get factors, beside weights that can hold their merge.

    Raises:
        ConfigError: If PEFT finds none of that name, or if what holds the weights cannot be held or merged so.
    """
    lacking = _lacks(list(decoder_layers(model)), TARGETS[adapted])
    if lacking:
        accepted = " | ".join([*_fitting(model, TARGETS), "tuning=full", f"another architecture ({FAMILIES})"])
        raise ConfigError("tuning.modules", adapted, f"{accepted}; {_told(model, lacking)}, which would get no factors")
    paths = [set(paths_in(layer, TARGETS[adapted])) for layer in decoder_layers(model)]
    experts = [bool(held & OF_EXPERTS.keys()) for held in paths]
    if any(experts) and not all(experts):
        mixed = f"{_title(model)} has layers with {EXPERTS} and others, to which PEFT gives no factors beside them"
        raise ConfigError("tuning.modules", adapted, f"query_value | attention | tuning=full; {mixed}")
    if any(experts) and base != "float32":
        accepted = f"float32 with a mixture of experts | another architecture ({FAMILIES})"
        raise ConfigError("tuning.base", base, f"{accepted}; {_title(model)} has {EXPERTS}")
    if base == "nf4" and any(map(is_turned, decoder_layers(model).modules())):
        raise ConfigError("tuning.base", base, f"float32 | bfloat16 with {_title(model)}, whose weights are turned")


def check_stored(model: Any, use: Use, names: Collection[str]) -> None:
    """Check that the start of linear layers can be read from the file, by the names of the model.

    Args:
        model: The model on the meta device.
        use: What is done with it.
        names: Names of the tensors in the file.

    Raises:
        ConfigError: If the file has them under other names (models with parts beside the language model).
    """
    for scope in use.scopes:
        wanted = linears(model, scope.name) if scope.stored else ()
        # What a file holds experts under is transformers' own affair; their start is not read from it.
        held = (matrix.name for matrix in wanted if matrix.site.expert is None)
        lost = next((name for name in held if stored(name, names) is None), None)
        if lost is not None:
            accepted = f"{scope.without} | a folder that holds {lost} under this name, as those of {FAMILIES} do"
            raise ConfigError(scope.key, scope.value, f"{accepted}; the folder holds {_title(model)} under others")


def _check_positions(model: Any, max_length: int, new_tokens: int) -> None:
    """Check that a table of positions, if there is one, has one for every token of a prompt and its answer.

    Raises:
        ConfigError: If not.
    """
    stack = decoder(model)
    most = getattr(stack.config, "max_position_embeddings", None)
    names = [name for name, each in stack.named_modules() if isinstance(each, torch.nn.Embedding)]
    table = any("pos" in name or name == "wpe" for name in names)
    if table and most is not None and max_length + new_tokens > most:
        left = f"at most {most - new_tokens}: of {most} positions of {_title(model)}, answers need {new_tokens}"
        raise ConfigError("trainer.max_length", max_length, left)
