"""Compare two models, wherever they were tuned: ``python -m cwac_lab.compare before=MODEL after=MODEL``."""

from __future__ import annotations

import sys

from omegaconf import DictConfig

from cwac_lab.core import cli


def main(config: DictConfig) -> None:
    """Ask both models the same prompts, print and write the table; exits with 1 where a rate is below its limit."""
    from cwac_lab.report.console import Screen
    from cwac_lab.run.comparison import below, compare, page

    screen = Screen()
    found = compare(config, screen)
    screen.table(found.title, found.heads, found.rows)
    screen.say(f"written: {page(found, config)}")
    failed = below(found, config)
    for line in failed:
        screen.say(line, "red")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    cli.launch(main, "compare")
