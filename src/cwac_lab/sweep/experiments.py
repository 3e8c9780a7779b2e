"""Experiments: the runs that their grids ask for, made where they lack, and their tables."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import psutil
import torch
import yaml
from omegaconf import DictConfig, ListConfig

from cwac_lab.core.cli import search_path
from cwac_lab.core.errors import ConfigError, MissingAsset, whole
from cwac_lab.core.overrides import text
from cwac_lab.core.paths import conf_dir
from cwac_lab.models.shipped import PACKAGED
from cwac_lab.report.console import Screen
from cwac_lab.report.files import write
from cwac_lab.report.layout import PLAIN, Layout
from cwac_lab.results.store import runs
from cwac_lab.sweep import grid
from cwac_lab.sweep.cells import Cells
from cwac_lab.sweep.grid import Grid
from cwac_lab.sweep.runner import Outcome, Overrides, sweep

# Bytes that a run of the packaged 135M weights takes at most: weights, gradients and AdamW's moments in float32, the
# start's copy and activations.
MEMORY = 4 * 2**30


def chosen(asked: DictConfig) -> list[Grid]:
    """Return the grids that ``asked.exp`` names: one, several, or ``all``.

    Raises:
        ConfigError: If ``seeds`` or ``jobs`` is below 1, or there is no such experiment.
        MissingAsset: If there is no grid.
    """
    whole("seeds", asked.seeds, 1)
    if asked.jobs is not None:
        whole("jobs", asked.jobs, 1)
    names = list(asked.exp) if isinstance(asked.exp, ListConfig) else [str(asked.exp)]
    if not names:
        raise ConfigError("exp", "[]", "all, or names of experiments")
    files = grid.find(Path(asked.experiments_root), None if names == ["all"] else names)
    if not files:
        raise MissingAsset(f"experiments_root={asked.experiments_root}: no grid (NAME{grid.SUFFIX}) there")
    return [grid.read(file, asked.profile_name) for file in files]


def _small(override: str) -> bool:
    """Tell whether an override leaves the model that of the packaged 135M weights."""
    key, _, value = override.partition("=")
    if key in ("model.path", "model.adapter"):
        return value == "null"
    if key == "experiment":
        return all(map(_keeps_small, value.strip("[]").split(",")))
    if key != "model":
        return True
    file = conf_dir() / "model" / f"{value}.yaml"
    weights = yaml.safe_load(file.read_text(encoding="utf-8"))["weights"] if file.is_file() else {}
    return bool((weights.get("embedded") or {}).get("package") == PACKAGED)


def _keeps_small(experiment: str) -> bool:
    """Tell the same of an option of ``experiment``, with those that it builds on; not of one from elsewhere."""
    if experiment == "null":
        return True
    file = conf_dir() / "experiment" / f"{experiment.strip()}.yaml"
    if not file.is_file():
        return False
    listed = yaml.safe_load(file.read_text(encoding="utf-8")).get("defaults", [])
    models = [each["override /model"] for each in listed if isinstance(each, dict) and "override /model" in each]
    others = [each for each in listed if isinstance(each, str) and each != "_self_"]
    return all(_small(f"model={model}") for model in models) and all(map(_keeps_small, others))


def fitting(profile: str, overrides: Iterable[str]) -> int:
    """Return how many runs this machine takes side by side.

    On a CPU two runs with a thread each end sooner than one after the other; each needs ``MEMORY``. A GPU takes one,
    and so does a model that is larger, or of unknown size.

    Args:
        profile: Their profile.
        overrides: Those of all runs.
    """
    if profile != "embedded" or torch.accelerator.is_available() or not all(map(_small, overrides)):
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, psutil.virtual_memory().available // MEMORY))


def make(grids: Sequence[Grid], root: Path, asked: DictConfig, screen: Screen, layout: Layout = PLAIN) -> list[Outcome]:
    """Make the runs that grids lack, all in one sweep, and a table a grid as its runs are there.

    Returns the runs that failed.

    Args:
        grids: What runs there are to be.
        root: Output folder.
        asked: ``seeds`` and ``jobs``, and ``overrides`` for every run.
        screen: What the user reads.
        layout: Of the tables.
    """
    more = [
        *([] if any(each.startswith("hydra.searchpath=") for each in asked.overrides) else search_path()),
        *asked.overrides,
    ]
    overrides = {override for each in grids for run in each.runs(1) for override in (*run, *more)}
    jobs = fitting(asked.profile_name, overrides) if asked.jobs is None else asked.jobs
    wanted = {each: [(*run, *more, text("output_root", root)) for run in each.runs(asked.seeds)] for each in grids}
    for each in grids:
        screen.say(f"{each.name}: {each.title} ({len(wanted[each])} runs)")
    left = {each: set(runs) for each, runs in wanted.items()}
    ended: dict[Overrides, Outcome] = {}
    every = list(dict.fromkeys(run for runs in wanted.values() for run in runs))
    for outcome in sweep(every, jobs, screen, screen.say, Cells(root)):
        ended[outcome.overrides] = outcome
        for each in [each for each, rest in left.items() if rest == {outcome.overrides}]:
            _table(root, each.name, [ended[run] for run in wanted[each]], screen, layout)
        for rest in left.values():
            rest.discard(outcome.overrides)
    failed = [outcome for outcome in ended.values() if outcome.status == "failed"]
    for outcome in failed:
        screen.say(f"{outcome.status}: {' '.join(outcome.overrides)}: {outcome.reason}", "red")
    return failed


def _table(root: Path, name: str, made: list[Outcome], screen: Screen, layout: Layout) -> None:
    """Write the table of a grid over what became of its runs."""
    elsewhere = sum(outcome.status == "running" for outcome in made)
    if elsewhere:
        screen.say(f"{name}: {elsewhere} runs are left to another process: the table is without them")
    paths = {outcome.path for outcome in made}
    if any(outcome.status == "ok" for outcome in made):
        print(write(root, name, [run for run in runs(root) if run.path in paths], layout=layout))
