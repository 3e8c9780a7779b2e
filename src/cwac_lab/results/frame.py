"""All runs of a store as one table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from cwac_lab.errors import LabError
from cwac_lab.results import store
from cwac_lab.results.store import RunFolder


def load(output_root: str | Path = "outputs") -> pd.DataFrame:
    """Return one row a run, finished or not.

    Columns: ``run`` (folder name), ``status`` (``ok``, ``failed``, ``running``, ``interrupted``, ``unreadable``: broken
    or of another schema) and ``reason``; of finished runs also what ran (``weights``, ``model``, ``task``,
    ``constraint``, ``harmful_ratio``, ``seed``, ...), each rate in percent with ``_low``, ``_high`` (95 %) and ``_n``,
    ``leak``, ``broken``, and ``seconds`` in total.

    Args:
        output_root: Folder that holds ``runs/``.
    """
    return pd.DataFrame([_row(run) for run in store.runs(Path(output_root))])


def _row(run: RunFolder) -> dict[str, Any]:
    try:
        row: dict[str, Any] = {"run": run.path.name, "status": run.status, "reason": run.told().get("reason")}
        return row | (_measured(run.facts()) if row["status"] == "ok" else {})
    except LabError as error:
        return {"run": run.path.name, "status": "unreadable", "reason": str(error)}


def _measured(metrics: dict[str, Any]) -> dict[str, Any]:
    found = {name: metrics.get(name) for name in (*store.FACTS, "leak", "broken")}
    for name, rate in metrics.items():
        if isinstance(rate, dict) and {"value", "low", "high", "n"} <= rate.keys():
            found |= {name: rate["value"], **{f"{name}_{part}": rate[part] for part in ("low", "high", "n")}}
    return found | {"seconds": sum(stage["seconds"] for stage in metrics["stages"].values())}
