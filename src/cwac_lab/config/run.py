"""The typed run configuration: Hydra composes it, this module checks it, before anything heavy happens."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from cwac_lab import judges
from cwac_lab.config.binding import bind, bind_target, mapping
from cwac_lab.config.checks import cross_check
from cwac_lab.config.groups import AlignConfig, DiagnosticsConfig, ExportConfig, ProfileConfig
from cwac_lab.core import distributed
from cwac_lab.core.errors import ConfigError, in_range, one_of
from cwac_lab.data.attacks import AttackConfig
from cwac_lab.data.forms import SYSTEM, WORDS, FormsConfig
from cwac_lab.data.plain_text import documents
from cwac_lab.data.sources import DataConfig
from cwac_lab.data.suites import SuiteConfig
from cwac_lab.data.tasks.base import Task
from cwac_lab.defenses.cwac.sae.train import SAEConfig
from cwac_lab.defenses.interface import Composite, Defense, Requirements
from cwac_lab.evaluation import engines, harness
from cwac_lab.evaluation.metrics import POOLED
from cwac_lab.evaluation.objectives import DIRECTIONS
from cwac_lab.evaluation.settings import EvaluationConfig
from cwac_lab.judges.endpoint import EndpointConfig
from cwac_lab.models.adapters import TuningConfig
from cwac_lab.models.loading import ModelConfig
from cwac_lab.training.settings import INCIDENTAL_TRAINER, GuardConfig, LoggerConfig, TrainerConfig

# Compositions with a name of their own; others are called after their parts.
_NAMES = {(): "none", ("activation", "weight"): "coupled"}
# Settings that do not change what a run computes; they are left out of its key.
# Paths are among them: what they lead to, weights and data, is in the key by content.
INCIDENTAL = (
    *("logger", "output_root", "cache_root", "force", "dry", "objective"),
    *("trainer.accelerator", "data.root", "data.max_line"),
    *("model.path", "model.revision", "model.adapter", "model.base"),
    *("export", "diagnostics", "task.train", "task.test", "task.system_rates", "tuning.save"),
    *("evaluation.judges", "evaluation.endpoint", "suites", "align.rebuild", "align.export"),
    *(f"evaluation.endpoint.{each.name}" for each in fields(EndpointConfig)),
    "evaluation.words_rates",
    *("evaluation.perplexity", "evaluation.plain_text", "evaluation.every_n_steps", "evaluation.watched"),
    *("evaluation.lm_eval", "evaluation.lm_eval_limit", "evaluation.lm_eval_tasks"),
    *(f"trainer.{name}" for name in INCIDENTAL_TRAINER),
)
# The same, where rounding is another.
ALIKE = (*INCIDENTAL, "trainer.devices")


@dataclass
class Run:
    """A checked configuration: plain settings, and the task and defence as objects.

    Attributes:
        constraint_name: Name of the method's row in tables (key ``label``); by default from the constraint's parts.
        harmful_ratio: Share of harmful rows in the fine-tuning set.
        seed: Draws the mixture, the order of batches and the factors of LoRA. The aligned start, the pools of prompts
            and the test rows do not depend on it.
        finetune: False evaluates the start itself, the first row of every table.
        force: Make a run again that is already recorded.
        dry: Tell what the run would take, and end before weights are loaded.
        objective: What a search is told of the run, one of ``evaluation.objectives.DIRECTIONS``.
        output_root: Folder of records, tables and pages.
        cache_root: Folder of what runs share: weights, starts, subspaces, autoencoders.
    """

    task: Task
    constraint: Composite
    constraint_name: str
    model: ModelConfig
    profile: ProfileConfig
    data: DataConfig
    sae: SAEConfig
    tuning: TuningConfig
    trainer: TrainerConfig
    guard: GuardConfig
    logger: LoggerConfig
    align: AlignConfig
    export: ExportConfig
    evaluation: EvaluationConfig
    suites: dict[str, SuiteConfig]
    attack: AttackConfig
    forms: FormsConfig
    diagnostics: DiagnosticsConfig
    harmful_ratio: float
    seed: int
    finetune: bool
    force: bool
    dry: bool
    objective: str
    output_root: str
    cache_root: str
    resolved: dict[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """The type that weights are loaded in."""
        return (self.tuning.dtype if self.finetune else None) or self.trainer.dtype

    @property
    def method(self) -> str:
        """The name of the row in tables: the constraint, or ``start`` where nothing is fine-tuned."""
        return self.constraint_name if self.finetune else "start"


class _Settings(dict[str, Any]):
    """Plain settings; a key that was taken out is a user's error."""

    def __missing__(self, key: str) -> Any:
        raise ConfigError(key, "", "a value (it has no default)")


def _part(key: str, node: Any) -> Defense:
    if not isinstance(node, dict):
        raise ConfigError(key, node, "the settings of a defence, as constraint=[weight,activation] composes them")
    return bind_target(key, Defense, node)


def _attack(node: Any) -> AttackConfig:
    """Return the attack: plain settings, or a class of the user's own."""
    own = "_target_" in mapping("attack", node)
    return bind_target("attack", AttackConfig, node) if own else bind("attack", AttackConfig, node)


def suites_of(node: Any) -> dict[str, SuiteConfig]:
    """Return the named suites that a run is asked beside its own prompts, from the resolved ``suites``.

    Raises:
        ConfigError: If one cannot have that name, or a setting of it is unknown.
    """
    found = {name: bind(f"suites.{name}", SuiteConfig, each) for name, each in mapping("suites", node).items()}
    for name, suite in found.items():
        if name in (POOLED, SYSTEM, WORDS) or "/" in name:
            raise ConfigError("suites", name, f"a name without a slash, other than {POOLED}, {SYSTEM} and {WORDS}")
        if suite.judge is not None:
            judges.known(suite.judge)
    return found


def requirements(parts: dict[str, Any]) -> Requirements:
    """Return what the resolved ``constraint`` group of a run needs.

    Raises:
        ConfigError: If a part or one of its settings is unknown.
    """
    return Composite({name: _part(f"constraint.{name}", node) for name, node in parts.items()}).requirements


def _scalars(config: _Settings) -> dict[str, Any]:
    ratio, seed = config["harmful_ratio"], config["seed"]
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)):
        raise ConfigError("harmful_ratio", ratio, "a number in [0, 1]")
    in_range("harmful_ratio", ratio, 0, 1)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ConfigError("seed", seed, "an integer >= 0")
    in_range("seed", seed, 0, 2**53)  # larger ones could share a key
    # Records of before have no ``dry``.
    flags = {"finetune": config["finetune"], "force": config["force"], "dry": config.get("dry", False)}
    for key, value in flags.items():
        one_of(key, value, (True, False))
    objective = config.get("objective", "errors")
    one_of("objective", objective, DIRECTIONS)
    return {"harmful_ratio": float(ratio), "seed": seed, **flags, "objective": objective}


def _check_finite(key: str, node: Any) -> None:
    """Check that no number is infinite or NaN, which records, as JSON, could not tell."""
    if isinstance(node, float) and not math.isfinite(node):
        raise ConfigError(key, node, "a finite number")
    for name, child in node.items() if isinstance(node, dict) else ():
        _check_finite(f"{key}.{name}".lstrip("."), child)


def read(config: DictConfig, *, recorded: bool = False) -> Run:
    """Check a composed configuration and return it typed; loads no data and no weights.

    Args:
        config: The configuration.
        recorded: Whether it is that of a record, which may have been made under a rule that no new run is.

    Raises:
        ConfigError: One line that names the key, the value and what is accepted.
    """
    try:
        resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise ConfigError(str(error.full_key), "???", "a value (it has no default)") from None
    assert isinstance(resolved, dict)
    settings = _Settings({str(key): value for key, value in resolved.items()})
    _check_finite("", settings)
    plain = _scalars(settings)
    nodes = mapping("constraint", settings["constraint"])
    parts = {str(name): _part(f"constraint.{name}", node) for name, node in nodes.items()}
    constraint_name = str(settings["label"] or _NAMES.get(tuple(sorted(parts))) or "+".join(sorted(parts)))
    run = Run(
        task=bind_target("task", Task, settings["task"]),
        constraint=Composite(parts),
        constraint_name=constraint_name,
        model=bind("model", ModelConfig, settings["model"]),
        profile=bind("profile", ProfileConfig, settings["profile"]),
        data=bind("data", DataConfig, settings["data"]),
        sae=bind("sae", SAEConfig, settings["sae"]),
        tuning=bind("tuning", TuningConfig, settings["tuning"]),
        trainer=bind("trainer", TrainerConfig, settings["trainer"]),
        guard=bind("guard", GuardConfig, settings.get("guard") or {}),
        logger=bind("logger", LoggerConfig, settings["logger"]),
        align=bind("align", AlignConfig, settings["align"]),
        export=bind("export", ExportConfig, settings.get("export") or {}),
        evaluation=bind("evaluation", EvaluationConfig, settings["evaluation"]),
        suites=suites_of(settings.get("suites") or {}),
        attack=_attack(settings.get("attack") or {}),
        forms=bind("forms", FormsConfig, settings.get("forms") or {}),
        diagnostics=bind("diagnostics", DiagnosticsConfig, settings.get("diagnostics") or {}),
        **plain,
        output_root=str(settings["output_root"]),
        cache_root=str(settings["cache_root"]),
        resolved={**settings, **plain},
    )
    if not recorded:
        _check_label(run, settings["label"])
    if run.data.near == "exact" and not recorded:
        raise ConfigError("data.near", "exact", "ngram | embedding (exact is the rule of earlier records only)")
    cross_check(run)
    return run


def _check_label(run: Run, label: object) -> None:
    """Check that a name of one's own is none that says something else of a run, and can be part of a folder's."""
    other = "none" if run.constraint.parts else ""
    if label is not None and ("/" in str(label) or str(label) in ("", "start", other)):
        raise ConfigError("label", label, "a name without a slash; start and none are others")


def check_device(run: Run) -> None:
    """Check that this machine has a device of the kind that a configuration asks for.

    Raises:
        ConfigError: If not.
    """
    if _devices(run) == 0:
        kind = run.trainer.device.type
        raise ConfigError("trainer.accelerator", run.trainer.accelerator, f"cpu | auto: this machine has no {kind}")


def _devices(run: Run) -> int:
    """Return how many devices of the kind that is asked for this machine has."""
    return torch.accelerator.device_count() if run.trainer.device.type != "cpu" else os.cpu_count() or 1


def check_machine(run: Run) -> None:
    """Check that this machine has what a configuration asks for, which may be a record's that was made elsewhere.

    Raises:
        ConfigError: If not.
    """
    trainer = run.trainer
    engines.check(run.evaluation.engine, trainer.devices)
    judges.check(run.evaluation.judges, run.evaluation.endpoint, run.cache_root)
    for judge in {suite.judge for suite in run.suites.values() if suite.judge is not None}:
        judges.check([judge], run.evaluation.endpoint, run.cache_root)
    harness.check(run.evaluation, trainer.devices)
    if run.evaluation.perplexity:
        documents(run.evaluation.plain_text)
    check_device(run)
    if trainer.devices > (there := _devices(run)):
        accepted = f"at most {there}, what this machine has of {trainer.device.type}"
        raise ConfigError("trainer.devices", trainer.devices, accepted)
    distributed.check(trainer.devices)
    if trainer.strategy == "fsdp" and trainer.devices == 1 and not distributed.launched():
        raise ConfigError("trainer.strategy", "fsdp", "ddp with trainer.devices=1: there is nothing to shard among")
