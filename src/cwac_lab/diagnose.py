"""Measure drift between a start and a fine-tuned model: ``python -m cwac_lab.diagnose run=outputs/runs/NAME``."""

from __future__ import annotations

import os
from pathlib import Path

from omegaconf import DictConfig, ListConfig

from cwac_lab.core import cli


def main(config: DictConfig) -> None:
    """Measure one run, all that lack it, or two folders; prints the means over layers.

    With all runs of a store, or of several, also which measurement goes with the harmful score.
    """
    from cwac_lab.core.errors import LabError
    from cwac_lab.diagnostics.evidence import correlations
    from cwac_lab.report.console import Screen
    from cwac_lab.results import load
    from cwac_lab.results.store import DRIFT, RunFolder
    from cwac_lab.run.drift import Measurer, lacking, of_folders, of_run

    screen = Screen()
    measure = Measurer(screen.say)
    if config.before is not None or config.after is not None:
        screen.drift(f"{config.before} -> {config.after}", of_folders(config, measure))
        return
    if config.run is not None:
        folder = RunFolder(Path(config.run))
        screen.drift(folder.path.name, of_run(folder, config, measure))
        return
    given = config.output_root if isinstance(config.output_root, ListConfig) else [config.output_root]
    roots = [os.path.expanduser(str(root)) for root in given]
    folders = lacking(roots)
    screen.say(f"{len(folders)} runs of {', '.join(roots)} have a model and no {DRIFT}")
    for folder in folders:
        try:
            screen.drift(folder.path.name, of_run(folder, config, measure))
        except LabError as error:
            screen.say(f"left out: {folder.path.name}: {error}")
    import pandas as pd

    screen.correlations(correlations(pd.concat([load(root) for root in roots])))


if __name__ == "__main__":
    cli.launch(main, "diagnose")
