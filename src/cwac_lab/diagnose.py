"""Measure drift between a start and a fine-tuned model: ``python -m cwac_lab.diagnose run=outputs/runs/NAME``."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from cwac_lab.core import cli

if TYPE_CHECKING:
    from cwac_lab.results.store import RunFolder
    from cwac_lab.run.drift import Measurer


def _of_run(folder: RunFolder, config: DictConfig, measure: Measurer) -> dict[str, Any]:
    """Measure a finished run and write its ``drift.json``.

    Raises:
        ConfigError: If the run is not finished or has no model.
    """
    from cwac_lab.core.errors import ConfigError
    from cwac_lab.results import store

    if not folder.done() or not folder.has(store.MODEL):
        raise ConfigError("run", folder.path, f"a finished run with {store.MODEL}/ (trainer.export=true)")
    settings = folder.config()
    # All runs are told in the same directions and latents, whatever forms they held refusals in.
    composed = cli.compose([f"constraint={config.measured_in}"])
    settings |= {group: OmegaConf.to_container(composed[group], resolve=True) for group in ("constraint", "forms")}
    settings["diagnostics"] = {"n_prompts": config.n_prompts}
    return measure.of_run(folder, settings)


def _weights(folder: RunFolder) -> str:
    """Return the hash of the weights that a run started from, none where its record cannot be read."""
    from cwac_lab.core.errors import LabError

    with suppress(LabError):
        return str(folder.facts()["weights_content"])
    return ""


def _of_folders(config: DictConfig, measure: Measurer, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure one model folder against another.

    Raises:
        ConfigError: If they cannot be compared.
    """
    from cwac_lab.config.run import read
    from cwac_lab.core.errors import ConfigError
    from cwac_lab.core.overrides import text

    for key in ("before", "after"):
        if config[key] is None or not (Path(config[key]) / "config.json").is_file():
            raise ConfigError(key, config[key], "a folder that transformers loads a model from")
    given = [text("model.path", config.before), "model.align=none", f"constraint={config.measured_in}"]
    run = read(cli.compose([*given, f"diagnostics.n_prompts={config.n_prompts}", *config.overrides]))
    from cwac_lab.diagnostics.alike import check_alike
    from cwac_lab.models.adapters import TuningConfig

    run.tuning, run.trainer = TuningConfig(), replace(run.trainer, precision="32-true")  # as the other one is loaded
    for words in check_alike(Path(config.before), Path(config.after)):
        say(words)
    return measure(run, Path(config.after))


def main(config: DictConfig) -> None:
    """Measure one run, all that lack it, or two folders; prints the means over layers.

    With all runs of a store, or of several, also which measurement goes with the harmful score.
    """
    import pandas as pd

    from cwac_lab.core.errors import LabError
    from cwac_lab.diagnostics.evidence import correlations
    from cwac_lab.results import load
    from cwac_lab.results.console import Screen
    from cwac_lab.results.store import DRIFT, MODEL, RunFolder, runs
    from cwac_lab.run.drift import Measurer

    screen = Screen()
    measure = Measurer(screen.say)
    if config.before is not None or config.after is not None:
        screen.drift(f"{config.before} -> {config.after}", _of_folders(config, measure, screen.say))
        return
    several = isinstance(config.output_root, ListConfig)
    given = [str(root) for root in config.output_root] if several else [str(config.output_root)]
    roots = [os.path.expanduser(root) for root in given]
    folders = [run for root in roots for run in runs(Path(root))]
    if config.run is not None:
        folders = [RunFolder(Path(config.run))]
    else:
        lacking = (each for each in folders if each.has(MODEL) and each.done() and not each.has(DRIFT))
        folders = sorted(lacking, key=_weights)  # runs that start alike share what is taken from the start
        screen.say(f"{len(folders)} runs of {', '.join(roots)} have a model and no {DRIFT}")
    for folder in folders:
        try:
            screen.drift(folder.path.name, _of_run(folder, config, measure))
        except LabError as error:
            if config.run is not None:
                raise
            screen.say(f"left out: {folder.path.name}: {error}")
    if config.run is None:
        screen.correlations(correlations(pd.concat([load(root) for root in roots])))


if __name__ == "__main__":
    cli.launch(main, "diagnose")
