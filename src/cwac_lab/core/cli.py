"""The frame of every entry point: Hydra composes, the configuration is checked, errors become one line."""

from __future__ import annotations

import math
import os
import re
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError

from cwac_lab.core import outputs, overrides, progress, resolvers
from cwac_lab.core.errors import ConfigError, Diverged, LabError
from cwac_lab.core.memory import give_back
from cwac_lab.core.paths import conf_dir

resolvers.register()  # whoever composes a configuration may resolve it
# Where a process that meets an error leaves a mark, for the exit code of the one that was started.
_FAILURES = "CWAC_LAB_FAILURES"


def _one_line(error: Exception) -> str:
    """Return a user's error in one line."""
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        more = "; others with pip install 'cwac-lab[launchers]'" if group == "hydra/launcher" else ""
        return f"{group}={option}: accepted: {' | '.join(error.options)}{more}"
    if isinstance(error, OverrideParseException):
        return overrides.unreadable(error.override, error.message)
    listed = re.match(r"In '\w+': Could not load '([\w/]+)/(\w+)'", str(error))
    if listed is not None and (options := sorted((conf_dir() / listed[1]).glob("*.yaml"))):  # one of several options
        named = {group: key for key, group in overrides.OF_GROUPS.items()}.get(listed[1], listed[1])
        names = " | ".join(file.stem for file in options)
        return f"{named}={listed[2]}: accepted: {names}, or one of your --config-dir"
    several = re.match(r"\s*Ambiguous value for argument '(.*)'\n", str(error))
    if several is not None:
        return overrides.ambiguous(several[1])
    if isinstance(error, HydraException) and isinstance(error.__cause__, OmegaConfBaseException):
        # Hydra says which override failed, OmegaConf why; the hint to append with "+" would only create a dead key.
        cause = error.__cause__
        key, parent = cause.full_key, cause.parent_node
        keys = ", ".join(sorted(map(str, parent))) if parent is not None else ""
        return f"{key}: no such key; accepted: {keys}" if keys else str(cause).splitlines()[0]
    return " ".join(str(error).split())


@cache
def _frame(arguments: tuple[str, ...], config_name: str) -> DictConfig:
    if GlobalHydra.instance().is_initialized():
        return hydra.compose(config_name, list(arguments))
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return hydra.compose(config_name, list(arguments))


# Plain keys of the top level, which composing does not depend on.
_PLAIN = ("seed", "harmful_ratio", "force", "finetune", "output_root")


def compose(arguments: Iterable[str], config_name: str = "config") -> DictConfig:
    """Return the composed configuration, as on the command line; what differs in plain keys only is composed once.

    Raises:
        LabError: If Hydra cannot read an argument.
    """
    meant = [overrides.as_meant(argument) for argument in arguments]
    plain = [override for override in meant if override.partition("=")[0] in _PLAIN]
    try:
        config = _frame(tuple(override for override in meant if override not in plain), config_name).copy()
    except OverrideParseException as error:
        raise LabError(overrides.unreadable(error.override, error.message)) from None
    for override in overrides.parsed(plain):
        config[override.key_or_group] = override.value()
    return config


def search_path() -> list[str]:
    """Return, as an override, the folders of options that the command line named; nothing where it named none.

    Other processes compose the same configuration with it.
    """
    if not HydraConfig.initialized():
        return []
    own = [
        overrides.quoted(f"{each['schema']}://{each['path']}")
        for each in HydraConfig.get().runtime.config_sources
        if each["provider"] not in ("hydra", "main", "schema") and each["schema"] in ("file", "pkg")
    ]
    return [f"hydra.searchpath=[{','.join(own)}]"] if own else []


def launch(task: Callable[[DictConfig], float | None], config_name: str = "config") -> None:
    """Run a task function under Hydra; exits with 2 on a user's error, printed as one line without a traceback.

    What the task returns is handed to Hydra's sweeper. In a multirun the jobs after a failed one still run, in this
    process or in those of a launcher.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra then raises instead of printing and exiting by itself
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())  # a user's own classes are found there, however this was started
    sys.argv[1:] = overrides.in_order([overrides.as_meant(argument) for argument in sys.argv[1:]])
    try:
        scratch = tempfile.TemporaryDirectory()
    except OSError as error:
        print(f"error: TMPDIR: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    progress.show(not int(os.environ.get("RANK", "0")))
    with scratch as failures:
        os.environ[_FAILURES] = failures  # processes of a launcher inherit it
        _launch(task, config_name)
        if any(Path(failures).iterdir()):
            sys.exit(2)


def _report(error: Exception) -> None:
    if Path(os.environ[_FAILURES]).is_dir():
        Path(os.environ[_FAILURES], uuid.uuid4().hex).touch()
    print(f"error: {_one_line(error)}", file=sys.stderr)


def _report_of_system(error: OSError | SafetensorError, settings: Mapping[Any, Any], keys: str = "") -> None:
    """Report what a system says of files in one line; raises what may be a mistake of the program."""
    told = outputs.one_line(error, settings, keys)
    if told is None:
        raise error
    _report(told)


def _check_folders(config: DictConfig) -> None:
    """Check that the folders that every command needs are named.

    Raises:
        ConfigError: If not.
    """
    for key in ("output_root", "cache_root", "experiments_root"):
        if key in config and not config[key]:
            raise ConfigError(key, config[key], "a folder")


def _worst() -> float:
    """Return what is to a search as bad as can be."""
    sweeper = HydraConfig.get().sweeper
    return -math.inf if str(sweeper.get("direction")).endswith("maximize") else math.inf


def _launch(task: Callable[[DictConfig], float | None], config_name: str) -> None:

    def job(config: DictConfig) -> float | None:
        # Caught here, before Hydra adds a line of its own.
        try:
            _check_folders(config)
            return task(config)
        except Diverged as error:
            _report(error)
            return _worst()
        except (LabError, OmegaConfBaseException, HydraException) as error:  # the last ones of a run it composes
            _report(error)
        except (OSError, SafetensorError) as error:
            _report_of_system(error, config)
        finally:
            give_back()  # before the next job of a multirun
        return None

    decorated = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=config_name)(job)
    try:
        decorated()
    except (HydraException, OmegaConfBaseException, OverrideParseException) as error:
        _report(error)
    except OSError as error:  # Hydra makes the folder of a sweep before its first job
        _report_of_system(error, {}, "output_root, hydra.sweep.dir or hydra.run.dir")
    except (ValueError, RuntimeError) as error:
        # A search has no best trial where every one failed, each with its line above, or where there was none. One over
        # a grid cannot end where the last trial failed (seen with hydra-optuna-sweeper 1.3.0).
        failed = any(Path(os.environ[_FAILURES]).iterdir())
        if "No trials are completed" not in str(error) and not (failed and "`Study.stop` is supposed" in str(error)):
            raise
        if not failed:
            _report(LabError("hydra.sweeper.n_trials: no trial was made (accepted: a budget of 1 or more)"))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
