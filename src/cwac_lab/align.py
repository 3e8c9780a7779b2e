"""The aligned start that runs share: ``python -m cwac_lab.align model=qwen``; ``align.rebuild=true`` trains it."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from cwac_lab.core import cli


def main(config: DictConfig) -> None:
    """Build the start, print its rates, and write its adapter where that is asked for."""
    from cwac_lab.config.run import read

    run = read(config)
    from cwac_lab.report.console import Screen
    from cwac_lab.run.alignment import alignment_report, export
    from cwac_lab.run.start import start

    screen = Screen()
    begin = start(run, screen.say)
    if begin.before is None:
        screen.say(f"{begin.folder.description}: not aligned here (model.align=none)")
        return
    screen.say(begin.folder.description)
    screen.rates(alignment_report(begin.folder.path))
    screen.say(f"cached: {begin.folder.path}")
    if run.align.export is not None:
        export(begin.folder.path, Path(run.align.export))
        screen.say(f"adapter and recipe: {run.align.export}")


if __name__ == "__main__":
    cli.launch(main)
