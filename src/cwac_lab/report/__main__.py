"""Write the page of all runs: ``python -m cwac_lab.report``, or of another store with ``output_root=FOLDER``."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from cwac_lab import cli


def main(config: DictConfig) -> None:
    """Write ``output_root/report/index.html`` and say where it is."""
    from cwac_lab.errors import MissingAsset
    from cwac_lab.report.page import write
    from cwac_lab.results.console import Screen

    root = Path(config.output_root)
    if not (root / "runs").is_dir():
        raise MissingAsset(f"output_root={root}: no runs there; run `python -m cwac_lab.train` first")
    screen = Screen()
    screen.say(f"written: {write(root, screen.say)}")


if __name__ == "__main__":
    cli.launch(main, "report")
