"""Paired differences: what a constraint changes on the very same prompts, rows and seeds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from cwac_lab.report.tables import ROW, SETTING, place
from cwac_lab.results import store
from cwac_lab.stats import paired_difference

# Column: rows that count, the verdict's field, and what is compared with.
COMPARED = {
    "FA - none": ("task", "correct", "none"),
    "HS - start": ("harmful", "complied", "start"),
    "over-refusal - start": ("harmless", "refused", "start"),
    "over-refusal (look-alikes) - start": ("lookalike", "refused", "start"),
}
# Settings that two runs must share for their difference to be the constraint's.
_SHARED = ("trainer.", "data.n_", "data.mixing")


def _partner(row: dict[str, Any], rows: list[dict[str, Any]], baseline: str) -> dict[str, Any] | None:
    """Return the run of the baseline that a run is compared with, or None where there is none."""

    def fits(other: dict[str, Any]) -> bool:
        if other["constraint"] != baseline or any(other[key] != row[key] for key in SETTING):
            return False
        if baseline == "start":
            return True
        shared = (key for key in row["config"] if key.startswith(_SHARED))
        same = all(other["config"].get(key) == row["config"][key] for key in shared)
        return same and (other["harmful_ratio"], other["seed"]) == (row["harmful_ratio"], row["seed"])

    return next((other for other in rows if fits(other)), None)


def _outcomes(row: dict[str, Any], kind: str, field: str) -> dict[str, float]:
    """Return the outcome of every item that has one: incoherent answers have none."""
    verdicts = row["run"].read(store.VERDICTS) if row["run"].has(store.VERDICTS) else []
    found = [v for v in verdicts if v["kind"] == kind and v[field] is not None and not v.get("incoherent")]
    return {verdict["id"]: float(verdict[field]) for verdict in found}


def _compare(group: list[dict[str, Any]], rows: list[dict[str, Any]], kind: str, field: str, baseline: str) -> str:
    pairs = [(row, _partner(row, rows, baseline)) for row in group]
    outcomes = [(_outcomes(a, kind, field), _outcomes(b, kind, field)) for a, b in pairs if b is not None]
    if not outcomes:
        return ""
    common = sorted(set.intersection(*(set(found) for pair in outcomes for found in pair)))
    if not common:
        return ""
    ours, other = (np.array([[pair[side][item] for item in common] for pair in outcomes]) for side in (0, 1))
    return str(paired_difference(ours, other))


def differences(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Return one row a setting, harmful ratio, constraint and variant, with the differences of ``COMPARED`` as text.

    Rows without a partner are left out.

    Args:
        rows: Records that ``tables.summary`` has named the variants of.
    """
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if row["constraint"] not in ("start", "none"):
            groups.setdefault(tuple(row[key] for key in [*SETTING, *ROW]), []).append(row)
    table = []
    for key, group in groups.items():
        cells = {title: _compare(group, rows, *how) for title, how in COMPARED.items()}
        if any(cells.values()):
            table.append(dict(zip([*SETTING, *ROW], key, strict=True)) | cells)
    table.sort(key=place)
    return pd.DataFrame(table)
