"""What settings of several groups must agree on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cwac_lab.core.errors import ConfigError
from cwac_lab.data.attacks import LEAST
from cwac_lab.data.mixing import counts
from cwac_lab.data.pools import KINDS, check_plan
from cwac_lab.data.taught import POOL as ALIGNMENT
from cwac_lab.defenses.interface import Requirements
from cwac_lab.defenses.together import check_together
from cwac_lab.models.adapters import SAVED, TARGETS
from cwac_lab.models.loading import choose_weights
from cwac_lab.models.settings import before_alignment

if TYPE_CHECKING:
    from cwac_lab.config.run import Run


def _total(plan: dict[str, dict[str, int]], pool: str) -> int:
    return sum(plan.get(pool, {}).values())


def _check_adapters(run: Run) -> None:
    if run.trainer.precision == "bf16-true":
        raise ConfigError(
            "trainer.precision",
            "bf16-true",
            "32-true | bf16-mixed: small updates are lost when merged into bf16 weights",
        )
    if run.constraint.requirements.whole_update:
        accepted = f"with constraint={run.constraint_name}, which changes merged weights"
        if run.tuning.save != SAVED[0]:
            raise ConfigError("tuning.save", run.tuning.save, f"{SAVED[0]} {accepted}")
        if run.guard.kl is not None:
            raise ConfigError("guard.kl", run.guard.kl, f"null, or tuning=full, {accepted}")
        within = {"evaluation": run.evaluation.every_n_steps}
        if run.diagnostics.enabled:
            within["diagnostics"] = run.diagnostics.every_n_steps
        for group, every in within.items():
            if every:
                raise ConfigError(f"{group}.every_n_steps", every, f"0, or tuning=full, {accepted}")
    if run.tuning.method == "null_space":
        _check_null_space(run)
    adapted = TARGETS[run.tuning.modules]
    for name, part in run.constraint.parts.items():
        scope = getattr(part, "modules", None)
        if scope is not None and not set(adapted) & set(TARGETS[scope]):
            raise ConfigError(
                f"constraint.{name}.modules", scope, f"a scope that tuning.modules={run.tuning.modules} has a part in"
            )


def _check_null_space(run: Run) -> None:
    """Check that there are protected directions of every layer that is to train the free ones alone."""
    held = {name: spec for name, part in run.constraint.parts.items() if (spec := part.requirements.subspace)}
    if not held:
        accepted = f"full | lora | qlora with constraint={run.constraint_name}, which protects no directions"
        raise ConfigError("tuning", "null_space", accepted)
    ((name, spec),) = held.items()
    if not set(TARGETS[run.tuning.modules]) <= set(TARGETS[spec.modules]):
        accepted = f"a scope within constraint.{name}.modules={spec.modules} with tuning=null_space"
        raise ConfigError("tuning.modules", run.tuning.modules, accepted)
    if spec.reach is not None:
        tail = getattr(run.constraint.parts[name], "tail", None)
        raise ConfigError(f"constraint.{name}.tail", tail, "free with tuning=null_space")


def _check_devices(run: Run) -> None:
    trainer = run.trainer
    if trainer.devices > trainer.batch_size:
        raise ConfigError("trainer.devices", trainer.devices, f"at most trainer.batch_size={trainer.batch_size}")
    if trainer.strategy == "ddp":
        return
    if run.diagnostics.enabled:
        raise ConfigError("diagnostics.enabled", True, "false with trainer.strategy=fsdp, or ddp")
    if run.guard.kl is not None:
        raise ConfigError("guard.kl", run.guard.kl, "null with trainer.strategy=fsdp, or ddp")
    if every := run.evaluation.every_n_steps:
        raise ConfigError("evaluation.every_n_steps", every, "0 with trainer.strategy=fsdp, or ddp")
    if run.tuning.base == "nf4":
        raise ConfigError("trainer.strategy", "fsdp", "ddp with tuning.base=nf4: its blocks are not sharded")
    whole = [name for name, part in run.constraint.parts.items() if not part.shardable]
    if whole:
        raise ConfigError("trainer.strategy", "fsdp", f"ddp with constraint={whole[0]}, which needs whole weights")


def _check_drift(run: Run) -> None:
    """Check that drift is measured between models of one precision: what a run ends in is in float32 with adapters."""
    if run.diagnostics.enabled and run.finetune and run.dtype != torch.float32:
        precision = ("trainer.precision", run.trainer.precision)
        key, held = ("tuning.base", run.tuning.base) if run.tuning.dtype else precision
        raise ConfigError(key, held, "float32 weights with diagnostics.enabled=true")


def _check_harmful_rows(run: Run) -> None:
    """Check that the pools hold as many harmful rows as the mixture or the attack needs."""
    n = run.data.n_train
    _, harmful = counts(n or 0, run.harmful_ratio, run.data.mixing)
    held = _total(run.data.harmful, "finetune")
    if run.finetune and run.attack.rows == "outliers" and not held:
        raise ConfigError(
            "data.harmful.finetune", 0, f">= 1 prompts: attack={run.attack.name} looks for rows like them"
        )
    if run.finetune and run.attack.rows == "harmful" and n is not None and harmful > held:
        most = held / n
        raise ConfigError(
            "harmful_ratio",
            run.harmful_ratio,
            f"at most {most:g} with data.n_train={n} (pool of {held} harmful rows)",
        )


def _check_guard(run: Run) -> None:
    """Check that a guard has prompts to watch, and a model that begins where the start is."""
    if not run.finetune or run.guard.kl is None:
        return
    if not _total(run.data.harmful, "reference"):
        raise ConfigError("guard.kl", run.guard.kl, "null, or >= 1 prompts in data.harmful.reference to watch")
    if run.tuning.base == "nf4":
        raise ConfigError("guard.kl", run.guard.kl, "null with tuning.base=nf4, whose rounding is a divergence already")


def _check_abliteration(run: Run) -> None:
    """Check that an attacker who abliterates has a fine-tuned model, and prompts of both kinds."""
    if run.attack.abliterate and not run.finetune:
        raise ConfigError("attack.abliterate", True, "false with finetune=false: the start is what others compare with")
    for kind, pool in (("harmful", "finetune"), ("harmless", "reference")) if run.attack.abliterate else ():
        if _total(getattr(run.data, kind), pool) < LEAST:
            accepted = f"false, or >= {LEAST} prompts in data.{kind}.{pool}"
            raise ConfigError("attack.abliterate", True, accepted)


def held_in_forms(needs: Requirements) -> bool:
    """Tell whether a constraint holds reference prompts in the forms of ``forms``: in a subspace, or by features."""
    return needs.subspace is not None or needs.features is not None


def cross_check(run: Run) -> None:
    """Check what concerns more than one group.

    Raises:
        ConfigError: If settings do not go together.
    """
    _check_devices(run)
    _check_drift(run)
    choose_weights(run.model, run.profile.name)
    check_plan(run.data)
    needs = run.constraint.requirements
    if run.finetune and needs.reference_prompts and not _total(run.data.harmful, "reference"):
        raise ConfigError(
            "data.harmful.reference", 0, f">= 1 prompts: constraint={run.constraint_name} holds refusals on them"
        )
    _check_guard(run)
    _check_abliteration(run)
    check_together(run.constraint.parts)
    if run.finetune and run.forms.others and not held_in_forms(needs):
        raise ConfigError(
            "forms", run.forms.name, f"own with constraint={run.constraint_name}, which holds on to no reference prompt"
        )
    benign = needs.features is not None or (needs.subspace is not None and needs.subspace.held_on != "harmful")
    if run.finetune and benign and not _total(run.data.harmless, "reference"):
        raise ConfigError("data.harmless.reference", 0, f">= 1 prompts: constraint={run.constraint_name} uses them")
    if run.finetune and needs.features is not None and needs.features.n_latents > run.sae.n_latents:
        raise ConfigError(
            "sae.n_latents",
            run.sae.n_latents,
            f">= {needs.features.n_latents}: constraint={run.constraint_name} holds as many",
        )
    if run.finetune and needs.base_weights and run.model.align == "none":
        try:
            before_alignment(run.model, run.profile.name)
        except ConfigError as error:
            needed = f"{error.accepted}: constraint={run.constraint_name} needs it"
            raise ConfigError(error.key, error.value, needed) from None
    exact = needs.exact_projection or needs.float32_weights
    if run.finetune and exact and run.trainer.precision == "bf16-true":
        what = "an exact projection" if needs.exact_projection else "what the constraint puts there"
        raise ConfigError("trainer.precision", "bf16-true", f"32-true | bf16-mixed: bf16 weights round {what} away")
    if run.finetune and run.tuning.adapts:
        _check_adapters(run)
    if run.finetune:
        run.attack.check(run.harmful_ratio)
    _check_harmful_rows(run)
    own = any(ALIGNMENT in getattr(run.data, kind) for kind in KINDS)
    given = _total(run.data.harmful, ALIGNMENT) and _total(run.data.harmless, ALIGNMENT)
    if run.model.align != "none" and own and not given:
        accepted = "none, or prompts in data.harmful.alignment and data.harmless.alignment, or in no such pool"
        raise ConfigError("model.align", run.model.align, accepted)
