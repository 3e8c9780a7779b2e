"""Write the page of all runs: ``python -m cwac_lab.report``, or of another store with ``output_root=FOLDER``."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from cwac_lab.core import cli


def main(config: DictConfig) -> None:
    """Write ``output_root/report/index.html`` and say where it is; with ``wandb`` tables and figures go there too."""
    from cwac_lab.core.errors import MissingAsset, one_of
    from cwac_lab.core.outputs import writable
    from cwac_lab.report.console import Screen
    from cwac_lab.report.page import write
    from cwac_lab.results.archive import holds

    one_of("wandb", config.wandb, ("offline", "online", "off"))
    root = Path(config.output_root)
    if not (root / "runs").is_dir() and not holds(root):
        raise MissingAsset(f"output_root={root}: no runs there; run `python -m cwac_lab.train` first")
    writable("output_root", root)
    screen = Screen()
    screen.say(f"written: {write(root, screen.say)}")
    if config.wandb != "off":
        from cwac_lab.report.tracking import log_store

        log_store(root, config.project, offline=config.wandb == "offline", say=screen.say)
        screen.say(f"tables and figures: wandb, {config.wandb}, project {config.project}")


if __name__ == "__main__":
    cli.launch(main, "report")
