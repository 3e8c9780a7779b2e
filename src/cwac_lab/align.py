"""Build the aligned start model that runs share (cached): ``python -m cwac_lab.align model=qwen``."""

from __future__ import annotations

from omegaconf import DictConfig

from cwac_lab.core import cli


def main(config: DictConfig) -> None:
    """Align, and print the rates before and after on the validation pool."""
    from cwac_lab.config.run import read

    run = read(config)
    from cwac_lab.results.console import Screen
    from cwac_lab.run.alignment import alignment_report
    from cwac_lab.run.start import start

    screen = Screen()
    begin = start(run, screen.say)
    report = alignment_report(begin.folder.path)
    if report is None:
        screen.say(f"{begin.folder.description}: not aligned here (model.align=none)")
        return
    screen.result("before alignment, validation pool", report["before"])
    screen.result(f"{begin.folder.description}, validation pool", report["after"])
    screen.say(f"cached: {begin.folder.path}")


if __name__ == "__main__":
    cli.launch(main)
