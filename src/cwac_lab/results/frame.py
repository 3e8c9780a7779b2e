"""All runs of a store as one table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from cwac_lab.results import store

_FACTS = ("weights", "weights_content", "model", "task", "data", "constraint", "harmful_ratio", "seed", "split")


def load(output_root: str | Path = "outputs") -> pd.DataFrame:
    """Return one row a run, finished or not.

    Columns: ``run`` (folder name), ``status`` (``ok``, ``failed``, ``running``, ``interrupted``) and ``reason``; of
    finished runs also what ran (``weights``, ``model``, ``task``, ``constraint``, ``harmful_ratio``, ``seed``, ...),
    each rate in percent with ``_low``, ``_high`` (95 %) and ``_n``, ``leak``, ``broken``, and ``seconds`` in total.

    Args:
        output_root: Folder that holds ``runs/``.

    Raises:
        LabError: If a record cannot be read.
    """
    rows = []
    for run in store.runs(Path(output_root)):
        row: dict[str, Any] = {"run": run.path.name, "status": run.status, "reason": run.told().get("reason")}
        rows.append(row | (_measured(run.read(store.METRICS)) if row["status"] == "ok" else {}))
    return pd.DataFrame(rows)


def _measured(metrics: dict[str, Any]) -> dict[str, Any]:
    found = {name: metrics.get(name) for name in (*_FACTS, "leak", "broken")}
    for name, rate in metrics.items():
        if isinstance(rate, dict) and {"value", "low", "high", "n"} <= rate.keys():
            found |= {name: rate["value"], **{f"{name}_{part}": rate[part] for part in ("low", "high", "n")}}
    return found | {"seconds": sum(stage["seconds"] for stage in metrics["stages"].values())}
