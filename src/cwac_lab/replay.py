"""Make a recorded run again and say what came out otherwise: ``python -m cwac_lab.replay run=experiments/NAME/RUN``."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from cwac_lab.core import cli


def main(config: DictConfig) -> None:
    """Read the recorded configuration, carry the run out in ``output_root``, and compare outcome and environment."""
    from cwac_lab.results.store import named

    record = named("run", Path(config.run))
    from cwac_lab.report.console import Screen
    from cwac_lab.run.replay import environment, grade, outcome, repeated

    screen = Screen()
    again = repeated(record, config, screen)
    screen.table(f"{record.path} and {again.path}", *outcome(record, again))
    heads, changes = environment(record, again)
    if changes:
        screen.table("what differs", heads, changes)
    screen.say(f"inputs and environment: {grade(changes)}")


if __name__ == "__main__":
    cli.launch(main, "replay")
