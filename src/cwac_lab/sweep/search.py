"""Searches by Hydra's Optuna sweeper: what has to hold before a trial begins."""

from __future__ import annotations

from typing import Any

from cwac_lab.config.run import Run
from cwac_lab.core.errors import ConfigError
from cwac_lab.evaluation.objectives import DIRECTIONS


def searched(sweeper: Any) -> bool:
    """Tell whether the settings ``hydra.sweeper`` are of Optuna's sweeper."""
    return "optuna" in sweeper._target_


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
