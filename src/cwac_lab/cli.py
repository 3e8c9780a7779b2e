"""The frame of every entry point: Hydra composes, the configuration is checked, errors become one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import hydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from cwac_lab.errors import LabError
from cwac_lab.paths import conf_dir


def _one_line(error: Exception) -> str:
    """Return a user's error in one line."""
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={option}: accepted: {' | '.join(error.options)}"
    if isinstance(error, HydraException) and isinstance(error.__cause__, OmegaConfBaseException):
        # Hydra says which override failed, OmegaConf why; the hint to append with "+" would only create a dead key.
        cause = error.__cause__
        key, parent = cause.full_key, cause.parent_node
        keys = ", ".join(sorted(map(str, parent))) if parent is not None else ""
        return f"{key}: no such key; accepted: {keys}" if keys else str(cause).splitlines()[0]
    return " ".join(str(error).split())


def launch(task: Callable[[DictConfig], None], config_name: str = "config") -> None:
    """Run a task function under Hydra; exits with 2 on a user's error, printed as one line without a traceback.

    In a multirun the jobs after a failed one still run.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra then raises instead of printing and exiting by itself
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    failures = []

    def report(error: Exception) -> None:
        failures.append(error)
        print(f"error: {_one_line(error)}", file=sys.stderr)

    def job(config: DictConfig) -> None:
        # Caught here, before Hydra adds a line of its own.
        try:
            task(config)
        except (LabError, OmegaConfBaseException) as error:
            report(error)

    decorated = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=config_name)(job)
    try:
        decorated()
    except (HydraException, OmegaConfBaseException, OverrideParseException) as error:
        report(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    if failures:
        sys.exit(2)
