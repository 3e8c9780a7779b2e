"""Defences in other trainers: Hugging Face's ``Trainer`` and TRL's ``SFTTrainer``, with PEFT or without.

    from cwac_lab.integrations import named, protect

    trainer = SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
    protect(trainer, named("weight"), harmful=PROMPTS)
    trainer.train()

The hooks are those of ``cwac_lab.defense``, called where the Lightning loop calls them, so that the same batches end in
the same weights (``tests/pipeline/test_integrations.py``). With PEFT, ``protect(...).merged()`` is the model to keep,
after training. One process; a stopped run starts anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import TrainerCallback

from cwac_lab.data.mixing import TrainRow
from cwac_lab.data.responses import refusal
from cwac_lab.data.sources import PromptRow
from cwac_lab.defense import Composite, Context, Defense, Requirements
from cwac_lab.errors import ConfigError, LabError
from cwac_lab.models.adapters import has_adapters
from cwac_lab.models.answers import Batch
from cwac_lab.models.chat import ChatFormat, Encoded
from cwac_lab.sae import latents
from cwac_lab.subspace.basis import Subspace, leading


def named(*overrides: str) -> Composite:
    """Return a defence as the command line names it: ``named("coupled", "constraint.weight.energy=0.995")``.

    The first is the name of a configuration (or several, ``"[weight,lisa]"``), the others set its keys.

    Raises:
        ConfigError: If one of them does not fit.
    """
    from cwac_lab.cli import compose
    from cwac_lab.config import read

    return read(compose([f"constraint={overrides[0]}", *overrides[1:]])).constraint


class DefenseCallback(TrainerCallback):
    """Calls a prepared defence's hooks on the steps of a trainer, and adds its terms to the loss."""

    def __init__(self, trainer: Any, defense: Defense, model: Any) -> None:
        """Take a trainer, a prepared defence and the plain model inside the trainer's, before anything is trained."""
        self._trainer, self._defense, self._model = trainer, defense, model
        self._clip = trainer.args.max_grad_norm
        trainer.args.max_grad_norm = 0.0  # clipped below, after the defence has changed gradients
        self._task_loss: Callable[..., Any] = trainer.compute_loss
        trainer.compute_loss = self.compute_loss

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the trainer's loss (or the defence's in its place) plus the defence's terms, shape ()."""
        if not model.training:
            return self._task_loss(model, inputs, return_outputs, num_items_in_batch)
        step, shares = self._trainer.state.global_step, self._shares(num_items_in_batch)
        batch = self._defense.select_batch(step, _batch(inputs))
        chosen = {**inputs, **batch}
        if batch["input_ids"] is not inputs["input_ids"]:  # other rows: what else the trainer knew of them is gone
            chosen, num_items_in_batch = dict(batch), None
        outputs = None
        loss: Float[Tensor, ""] | None = self._defense.task_loss(self._model, batch, step)
        if loss is None:
            loss = self._task_loss(model, chosen, return_outputs, num_items_in_batch)
            if return_outputs:
                loss, outputs = loss
        for term in self._defense.loss_terms(self._model, batch, step).values():
            loss = loss + term / shares
        return (loss, outputs) if return_outputs else loss

    def _shares(self, num_items_in_batch: Any) -> int:
        """Return what terms are divided by, so that those of accumulated batches add up to their mean.

        It is 1 where the trainer divides the whole loss itself.
        """
        trainer = self._trainer
        summed = trainer.loss_is_scaled_for_ga
        if summed is None:
            counted = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
            summed = counted or trainer.compute_loss_func is not None
        return int(trainer.current_gradient_accumulation_steps) if summed else 1

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Tell the defence how many steps there are, and all rows.

        Raises:
            LabError: If the trainer goes on with a stopped run, whose model is no longer at its start.
        """
        if state.global_step:
            raise LabError(f"protect: the run goes on at step {state.global_step} (accepted: a run from its start)")
        self._model.eval()
        self._defense.begin(state.max_steps, self._examples() if _overrides(self._defense, "begin") else [])
        self._model.train()

    def _examples(self) -> list[Encoded]:
        """Return the rows of the trainer's batches; the order of those to come does not change."""
        found = []
        with torch.random.fork_rng():
            for inputs in self._trainer.get_train_dataloader():
                batch = _batch(inputs)
                for ids, labels, mask in zip(
                    batch["input_ids"], batch["labels"], batch["attention_mask"].bool(), strict=True
                ):
                    found.append(Encoded(ids[mask].tolist(), labels[mask].tolist()))
        return found

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Let the defence change gradients, then clip them."""
        self._defense.after_backward(state.global_step)
        if self._clip:
            torch.nn.utils.clip_grad_norm_([p for p in self._model.parameters() if p.requires_grad], self._clip)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Let the defence change weights."""
        self._defense.after_optimizer_step(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Let the defence change the trained model; one with adapters when they are merged."""
        if not has_adapters(self._model):
            self._defense.after_training(self._model)

    def merged(self) -> Any:
        """Return the plain model of a trained PEFT one: adapters merged, then changed by the defence."""
        model = self._trainer.model.merge_and_unload()
        self._defense.after_training(model)
        return model


def _batch(inputs: dict[str, Any]) -> Batch:
    """Return the rows of a trainer's batch; right-padded, with labels that are -100 on prompts."""
    mask = inputs.get("attention_mask")
    if mask is None:
        raise LabError("protect: the trainer's batches have no attention_mask (accepted: padded rows, packing=False)")
    if not mask[:, 0].all():
        raise LabError("protect: the trainer's batches are padded on the left (accepted: on the right)")
    return {"input_ids": inputs["input_ids"], "attention_mask": mask, "labels": inputs["labels"]}


def _overrides(defense: Defense, *hooks: str) -> bool:
    """Tell whether a defence, or a part of it, has one of some hooks of its own."""
    parts = defense.parts.values() if isinstance(defense, Composite) else (defense,)
    return any(getattr(type(part), hook) is not getattr(Defense, hook) for part in parts for hook in hooks)


def _check(trainer: Any, defense: Defense, model: Any) -> None:
    """Check that a defence can work in a trainer.

    Raises:
        ConfigError: If not.
    """
    needs, arguments = defense.requirements, trainer.args
    if _overrides(defense, "wrap_dataset"):
        raise ConfigError("protect: defense", "adds rows", "a defence without rows of its own; add them to the dataset")
    if arguments.fp16:
        raise ConfigError("protect: fp16", True, "bf16 or float32: gradients must not be scaled")
    if arguments.world_size > 1:
        raise ConfigError("protect: world_size", arguments.world_size, "1 process")
    accumulated = arguments.gradient_accumulation_steps
    if accumulated > 1 and _overrides(defense, "select_batch", "task_loss"):
        raise ConfigError("protect: gradient_accumulation_steps", accumulated, "1 with this defence")
    if needs.exact_projection and not has_adapters(model) and model.dtype != torch.float32:
        raise ConfigError("protect: dtype", model.dtype, "float32 weights: others round an exact projection away")
    if any(getattr(module, "use_dora", {}) and any(module.use_dora.values()) for module in model.modules()):
        raise ConfigError("protect: use_dora", True, "plain LoRA: of DoRA the update is not B A")


def _check_given(needs: Requirements, given: set[str]) -> None:
    """Check that what a defence needs is given, by the names of ``protect``'s arguments.

    Raises:
        ConfigError: If something is not.
    """
    asked = {
        "harmful": needs.reference_prompts,
        "benign": any(spec is not None and spec.held_on == "both" for spec in (needs.subspace, needs.features)),
        "features": needs.features is not None,
        "base_weight": needs.base_weights,
    }
    for name, needed in asked.items():
        if needed and name not in given:
            raise ConfigError(f"protect: {name}", None, "a value: the defence needs it")


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
        benign: Harmless reference prompts, where the defence holds on to both kinds.
        features: Folder of encoders and safety latents for the activation constraint, as ``python -m cwac_lab.prepare``
            builds it for the same model.
        base_weight: Reader of weights before alignment by parameter name, for methods that need them.
        seed: Draws the order of reference prompts.

    Returns:
        The callback, which is already at work.

    Raises:
        ConfigError: If something that the defence needs is not given, or it would add rows of its own.
    """
    needs, model, tokenizer = defense.requirements, _plain(trainer.model), trainer.processing_class
    _check(trainer, defense, model)
    given = {"harmful": harmful, "benign": benign, "features": features, "base_weight": base_weight}
    _check_given(needs, {name for name, value in given.items() if value})
    chat = ChatFormat(tokenizer, getattr(trainer.args, "max_length", None) or 512)
    rows = [PromptRow(str(i), prompt) for i, prompt in enumerate(harmful)]
    reference = [chat.prompt_ids(prompt) for prompt in harmful]
    subspace = None
    model.eval()
    if needs.subspace is not None:
        held = reference + ([chat.prompt_ids(prompt) for prompt in benign] if needs.subspace.held_on == "both" else [])
        found = dict(leading(model, held, needs.subspace, chat.pad_id))
        subspace = Subspace({n: each.basis for n, each in found.items()}, {n: each.kept for n, each in found.items()})
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
        features=latents.load(Path(features)) if features is not None else (),
    )
    defense.prepare(context)
    callback = DefenseCallback(trainer, defense, model)
    trainer.add_callback(callback)
    return callback
