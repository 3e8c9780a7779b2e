"""Compare two models, wherever they were tuned: ``python -m cwac_lab.compare before=MODEL after=MODEL``."""

from __future__ import annotations

import sys
from pathlib import Path

from omegaconf import DictConfig

from cwac_lab.core import cli


def main(config: DictConfig) -> None:
    """Ask both models the same prompts, print and write what they differ in; exits with 1 below a limit."""
    from cwac_lab.report.compared import write
    from cwac_lab.report.console import Screen
    from cwac_lab.run.comparison import below, compare

    screen = Screen()
    found = compare(config, screen)
    screen.say(found.title)
    for grid in found.grids:
        screen.table(grid.title, grid.heads, grid.rows)
    for remark in found.remarks:
        screen.say(remark)
    screen.say(f"written: {' and '.join(map(str, write(found, Path(config.output_root))))}")
    failed = below(found, config)
    for line in failed:
        screen.say(line, "red")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    cli.launch(main, "compare")
