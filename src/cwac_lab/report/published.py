"""The values that the CWAC paper prints (arXiv 2604.12384, tables of its main text), to stand beside ours.

They are of other models, data sizes and judges than most of what runs here: a column for orientation, not a target.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

import pandas as pd

_METHODS = {"none": "sft"}
_MODELS = {
    "llama-2-7b": "Llama-2-7B", "llama-3-8b": "Llama-3-8B", "mistral-7b": "Mistral-7B", "gemma-2-9b": "Gemma-2-9B",
}  # fmt: skip
_TASKS = {"alpaca": "alpacaeval"}
# What its averages are over.
PAPER_TASKS = {"sst2", "agnews", "gsm8k"}
COLUMNS = {"HS": "paper HS", "FA": "paper FA"}


@cache
def values() -> pd.DataFrame:
    """Return the published values: table, model, method, task, harmful_ratio, metric, value (percent)."""
    return pd.read_csv(str(files(__package__).joinpath("published.csv")), dtype={"harmful_ratio": str})


def published(experiment: str | None, entry: dict[str, Any]) -> dict[str, str]:
    """Return the paper's HS and FA for a row of one of its tables, with the models named; empty text where unknown.

    Where it prints the average over its tasks only, that stands there and is called so.

    Args:
        experiment: Name of the table.
        entry: ``task``, ``harmful_ratio``, ``constraint``, ``variant`` of a row.
    """
    known = values()
    if experiment not in set(known["table"]):
        return {}
    method = _METHODS.get(entry["constraint"], entry["constraint"])
    rows = known[(known["table"] == experiment) & (known["method"] == method)]
    if entry["variant"]:
        rows = rows[:0]
    ratio = "" if entry["harmful_ratio"] is None else f"{entry['harmful_ratio']:g}"
    rows = rows[rows["harmful_ratio"].isna() | (rows["harmful_ratio"] == ratio)]
    task = _TASKS.get(entry["task"], entry["task"])
    own, mean = (rows[rows["task"] == name] for name in (task, "average"))
    rows, note = (own, "") if len(own) else (mean, "average of tasks")
    unknown = len(rows) and rows["harmful_ratio"].isna().all()
    note = ", ".join(filter(None, (note, "ratio not given" if unknown else "")))
    return {title: _text(rows[rows["metric"] == metric], note) for metric, title in COLUMNS.items()}


def _text(rows: pd.DataFrame, note: str) -> str:
    found = [f"{_MODELS[model]} {value:.1f}" for model, value in zip(rows["model"], rows["value"], strict=True)]
    return ", ".join(found) + (f" ({note})" if found and note else "")
