"""Searches by Hydra's Optuna sweeper: what has to hold before a trial begins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cwac_lab.config.run import Run
from cwac_lab.core.errors import ConfigError
from cwac_lab.evaluation.objectives import DIRECTIONS

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from optuna import Trial

# Ranks of LoRA that an attacker chooses from.
RANKS = (4, 16, 64)


def searched(sweeper: Any) -> bool:
    """Tell whether the settings ``hydra.sweeper`` are of Optuna's sweeper."""
    return "optuna" in sweeper._target_


def rank(config: DictConfig, trial: Trial) -> None:
    """Let a trial that trains by LoRA choose its rank, of ``RANKS``; other tunings have none.

    Optuna's sweeper calls it for each trial (``hydra.sweeper.custom_search_space``).

    Args:
        config: The settings that trials share; they tell the tuning that no trial chooses.
        trial: It has its other parameters already. A rank given on the command line stays.
    """
    told = {**trial.user_attrs, **trial.params}
    if told.get("tuning", config.tuning.method) in ("lora", "qlora") and "tuning.rank" not in told:
        trial.suggest_categorical("tuning.rank", RANKS)


def check(run: Run, sweeper: Any) -> None:
    """Check that a trial is of the validation split, and that its search can use what it is told.

    Args:
        run: The trial.
        sweeper: The settings ``hydra.sweeper``; those of another sweeper than Optuna's are left alone.

    Raises:
        ConfigError: If not.
    """
    if not searched(sweeper):
        return
    if run.dry:
        raise ConfigError("dry", run.dry, "false in a search; true with the settings of one trial, without search=")
    if run.evaluation.split != "validation":
        raise ConfigError("evaluation.split", run.evaluation.split, "validation: tuning never sees the test split")
    direction = getattr(sweeper.direction, "name", sweeper.direction)
    if direction != DIRECTIONS[run.objective]:
        accepted = f"{DIRECTIONS[run.objective]} with objective={run.objective}"
        raise ConfigError("hydra.sweeper.direction", direction, accepted)
    if run.objective == "harm" and not run.evaluation.perplexity:
        raise ConfigError("evaluation.perplexity", False, "true with objective=harm, which asks whether a model works")
