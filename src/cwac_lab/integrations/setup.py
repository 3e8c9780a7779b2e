"""``named`` and ``protect``: a defence by its name, and a trainer's model put under it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from cwac_lab.data.mixing import TrainRow
from cwac_lab.data.responses import refusal
from cwac_lab.data.sources import PromptRow
from cwac_lab.defenses.cwac.subspace.basis import leading, subspace_of
from cwac_lab.defenses.interface import Composite, Context, Defense
from cwac_lab.integrations.callback import DefenseCallback
from cwac_lab.integrations.checks import check_given, check_model, check_trainer, check_unasked, read_features
from cwac_lab.models.chat import ChatFormat
from cwac_lab.models.few_bits import keep_layout


def named(*overrides: str) -> Composite:
    """Return a defence as the command line names it: ``named("coupled", "constraint.weight.energy=0.995")``.

    The first is the name of a configuration (or several, ``"[weight,lisa]"``), the others set its keys.

    Raises:
        ConfigError: If one of them does not fit.
    """
    from cwac_lab.config.run import read
    from cwac_lab.core.cli import compose

    return read(compose([f"constraint={overrides[0]}", *overrides[1:]])).constraint


def _plain(model: Any) -> Any:
    """Return the transformers model inside a PEFT one, adapters in place."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _start_reader(model: Any) -> Callable[[str], Tensor]:
    """Return a reader of start weights: copies of what trains, and what does not where it is."""
    copies = {name: value.detach().cpu().clone() for name, value in model.named_parameters() if value.requires_grad}

    def read(name: str) -> Tensor:
        if name in copies:
            return copies[name]
        layer, _, last = name.rpartition(".")
        module = model.get_submodule(layer)
        parameter = getattr(getattr(module, "base_layer", module), last)
        assert isinstance(parameter, Tensor)
        return parameter.detach()

    return read


def protect(
    trainer: Any, defense: Defense, *, harmful: Sequence[str] = (), benign: Sequence[str] = (),
    features: Path | str | None = None, base_weight: Callable[[str], Tensor] | None = None, seed: int = 0,
) -> DefenseCallback:  # fmt: skip
    """Put a trainer's model under a defence; call it after the trainer is built and before it trains.

    Args:
        trainer: A ``Trainer`` or ``SFTTrainer`` whose model is the aligned start (with PEFT's LoRA or without), and
            whose ``processing_class`` is its tokenizer, with a chat template.
        defense: As ``named`` returns it.
        harmful: Reference prompts that the model refuses; the constraints hold on to them, and baselines learn refusals
            to them.
        benign: Harmless reference prompts, where the defence holds on to harmless ones.
        features: Folder of encoders and safety latents for the activation constraint, as ``python -m cwac_lab.prepare``
            builds it for the same model; others are refused.
        base_weight: Reader of weights before alignment by parameter name, for methods that need them.
        seed: Draws the order of reference prompts.

    Returns:
        The callback, which is already at work.

    Raises:
        ConfigError: If something that the defence needs is not given or not of this model, or if it would add rows of
            its own.
        LabError: If the trainer has trained, or is under a defence.
    """
    needs, model, tokenizer = defense.requirements, _plain(trainer.model), trainer.processing_class
    check_trainer(trainer, defense)
    check_model(needs, model)
    check_unasked(needs)
    given = {"harmful": harmful, "benign": benign, "features": features, "base_weight": base_weight}
    check_given(needs, {name for name, value in given.items() if value})
    chat = ChatFormat(tokenizer, getattr(trainer.args, "max_length", None) or 512)
    rows = [PromptRow(str(i), prompt) for i, prompt in enumerate(harmful)]
    reference = [chat.prompt_ids(prompt) for prompt in harmful]
    subspace = None
    keep_layout(model)
    model.eval()
    held_at = read_features(Path(features), needs.features, model) if needs.features and features else ()
    if needs.subspace is not None:
        kinds = {"harmful": [harmful], "both": [harmful, benign], "harmless": [benign]}[needs.subspace.held_on]
        held = [chat.prompt_ids(prompt) for kind in kinds for prompt in kind]
        subspace = subspace_of(leading(model, held, needs.subspace, chat.pad_id))
    context = Context(
        model=model,
        seed=seed,
        chat=chat,
        start_weight=_start_reader(model),
        reference=reference,
        benign=[chat.prompt_ids(prompt) for prompt in benign],
        refusals=[TrainRow(row.id, row.prompt, refusal(row), harmful=False) for row in rows],
        base_weight=base_weight,
        subspace=subspace,
        features=tuple(held_at),
    )
    defense.prepare(context)
    callback = DefenseCallback(trainer, defense, model)
    trainer.add_callback(callback)
    return callback
