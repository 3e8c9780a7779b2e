"""Weights & Biases: the rates, verdicts and drift of a run; the tables and figures of a store.

What is sent names prompts by id: the texts of prompts and answers stay in the run's folder and in the local page.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import pandas as pd

from cwac_lab.core.errors import MissingAsset
from cwac_lab.report import costs
from cwac_lab.report.grouping import said
from cwac_lab.report.rates import known
from cwac_lab.results import store
from cwac_lab.results.store import RunFolder


def log_run(loggers: Sequence[Any], folder: RunFolder, say: Callable[[str], None] = print) -> None:
    """Give a finished run's rates, verdicts and, where it was measured, drift to its loggers in Weights & Biases.

    Args:
        loggers: Lightning loggers; others than ``WandbLogger`` are passed over.
        folder: The run.
        say: Told where that fails: the record is written and stands.
    """
    from lightning.pytorch.loggers import WandbLogger

    for logger in loggers:
        if not isinstance(logger, WandbLogger):
            continue
        try:
            logger.experiment.summary.update(_summary(folder.read(store.METRICS)))
            logger.experiment.log(_media(folder))
        except Exception as error:  # noqa: BLE001 - whatever a tracker fails with, the run has not failed
            say(f"not told to wandb: {type(error).__name__}: {error}")


def _summary(record: dict[str, Any]) -> dict[str, Any]:
    """Return the rates and costs with intervals and n, and the facts that the banner tells."""
    told = {name: record.get(name) for name in (*store.FACTS, "broken", "leak")}
    rates = {name: record[name] for name in known([record]) if isinstance(record.get(name), dict)}
    rates |= {cost.name: costs.rate_of([record], cost).to_dict() for cost in costs.known([record])}
    return {**told, **{f"{name}.{part}": value for name, rate in rates.items() for part, value in rate.items()}}


def _media(folder: RunFolder) -> dict[str, Any]:
    import wandb

    rows = [{name: row[name] for name in ("kind", "id", "form") if name in row} | row["said"] for row in said(folder)]
    media = {"verdicts": wandb.Table(dataframe=pd.DataFrame(rows).fillna(""))}
    if folder.has(store.DRIFT):
        from cwac_lab.report.figures import drift_map

        media["drift"] = wandb.Image(drift_map(folder.read(store.DRIFT)))
    return media


def log_store(root: Path, project: str, *, offline: bool, say: Callable[[str], None] = print) -> None:
    """Give the tables and figures of all runs under an output folder to Weights & Biases, as a run named ``report``.

    Args:
        root: Output folder.
        project: Project there.
        offline: Write files under ``root/report`` for ``wandb sync`` and connect to nothing.
        say: Told of every record that cannot be read.

    Raises:
        MissingAsset: If there is no finished run, or Weights & Biases does not take it.
    """
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    from cwac_lab.report.figures import draw
    from cwac_lab.report.grouping import finished, records
    from cwac_lab.report.paired import differences
    from cwac_lab.report.tables import summary

    rows = records(list(store.runs(root)), say)
    if not finished(rows):
        raise MissingAsset(f"output_root={root}: no finished runs there; run `python -m cwac_lab.train` first")
    mode: Literal["offline"] | None = "offline" if offline else None
    tables = {"rates": summary(rows), "differences": differences(rows)}
    where = root / "report"
    where.mkdir(parents=True, exist_ok=True)
    try:  # create_new: a run that the caller has begun goes on untouched
        tracker = wandb.init(project=project, name="report", dir=str(where), mode=mode, reinit="create_new")
    except wandb.Error as error:
        raise MissingAsset(f"wandb=online: {error} (accepted: offline, off)") from error
    with TemporaryDirectory() as drawn, tracker:
        shown = {name: table.astype(object).fillna("").astype(str) for name, table in tables.items() if len(table)}
        media = {name: wandb.Table(dataframe=table) for name, table in shown.items()}
        files = [file for file in draw(rows, Path(drawn), "all") if file.suffix == ".png"]
        tracker.log({**media, **{file.stem: wandb.Image(str(file)) for file in files}})
