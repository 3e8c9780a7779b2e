"""Put the records of runs into two files: ``python -m cwac_lab.archive output_root=outputs to=experiments/NAME``."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from cwac_lab.core import cli


def main(config: DictConfig) -> None:
    """Add the runs of a store, or those that a query holds for, to the archive in a folder."""
    from cwac_lab.core.errors import MissingAsset
    from cwac_lab.core.outputs import writable
    from cwac_lab.report.console import Screen
    from cwac_lab.results import select
    from cwac_lab.results.archive import add
    from cwac_lab.results.store import runs

    root, to = Path(config.output_root), Path(config.to)
    found = list(runs(root)) if config.query is None else select(root, "query", config.query)
    if not found:
        raise MissingAsset(f"output_root={root}: no runs there; run `python -m cwac_lab.train` first")
    writable("to", to)
    screen = Screen()
    added, held = add(to, found, force=config.force, say=screen.say)
    screen.say(f"archived: {added} runs; {to} holds {held}, in records.parquet and verdicts.parquet")


if __name__ == "__main__":
    cli.launch(main, "archive")
