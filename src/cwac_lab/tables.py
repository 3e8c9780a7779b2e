"""Make the runs that a table lacks, and the tables: ``python -m cwac_lab.tables exp=ablation seeds=3``."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from omegaconf import DictConfig, ListConfig

from cwac_lab.core import cli

if TYPE_CHECKING:
    from cwac_lab.sweep.grid import Grid


def views(file: str | None) -> dict[str, str | None]:
    """Return the tables of a file, each with the query for its runs; without a file one table of all runs.

    Raises:
        MissingAsset: If there is no such file.
        ConfigError: If it does not map names to queries.
    """
    from cwac_lab.core.errors import ConfigError, MissingAsset

    if file is None:
        return {"summary": None}
    if not Path(file).is_file():
        raise MissingAsset(f"views={file}: no such file")
    accepted = "a YAML file that maps names of tables to pandas queries"
    try:
        found = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError("views", file, f"{accepted} ({' '.join(str(error).split())})") from None
    if not isinstance(found, dict) or not found:
        raise ConfigError("views", file, accepted)
    for name, query in found.items():
        if not isinstance(query, str) or not re.fullmatch(r"\w+", str(name)):
            raise ConfigError(f"views: {name}", query, "a name of letters, digits and _, and a pandas query")
    return {str(name): query for name, query in found.items()}


def main(config: DictConfig) -> None:
    """Write a table an experiment, or one of all recorded runs, under ``output_root/tables``, and its figures."""
    from cwac_lab.core.errors import ConfigError, MissingAsset, in_range
    from cwac_lab.core.outputs import writable
    from cwac_lab.core.overrides import text
    from cwac_lab.report.files import write
    from cwac_lab.results import select
    from cwac_lab.results.console import Screen
    from cwac_lab.results.store import runs
    from cwac_lab.sweep import grid

    root = Path(config.output_root)
    writable("output_root", root)
    if config.exp is None:
        for name, query in views(config.views).items():
            print(write(root, name, list(runs(root)) if query is None else select(root, f"views: {name}", query)))
        return
    if config.views is not None:
        raise ConfigError("views", config.views, "null with exp, whose grids say what their tables hold")
    for key in ("seeds", "jobs"):
        in_range(key, config[key], 1)
    names = list(config.exp) if isinstance(config.exp, ListConfig) else [str(config.exp)]
    folders = grid.find(Path(config.experiments_root), None if names == ["all"] else names)
    if not folders:
        raise MissingAsset(f"experiments_root={config.experiments_root}: no experiment with a {grid.FILE} there")
    grids: list[Grid] = [grid.read(folder, config.profile_name) for folder in folders]
    from cwac_lab.sweep.cells import Cells
    from cwac_lab.sweep.runner import sweep

    screen, cells, failed = Screen(), Cells(root), []
    for each in grids:
        screen.say(f"{each.name}: {each.title}")
        wanted = [(*run, *config.overrides, text("output_root", root)) for run in each.runs(config.seeds)]
        found = sweep(wanted, config.jobs, screen, screen.say, cells)
        failed += [outcome for outcome in found if outcome.status == "failed"]
        elsewhere = sum(outcome.status == "running" for outcome in found)
        if elsewhere:
            screen.say(f"{elsewhere} runs are left to another process: the table is without them")
        paths = {outcome.path for outcome in found}
        if any(outcome.status == "ok" for outcome in found):
            print(write(root, each.name, [run for run in runs(root) if run.path in paths]))
    for outcome in failed:
        screen.say(f"{outcome.status}: {' '.join(outcome.overrides)}: {outcome.reason}", "red")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    cli.launch(main, "tables")
