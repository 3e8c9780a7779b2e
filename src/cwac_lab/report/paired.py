"""Paired differences: what a constraint changes on the very same prompts, rows and seeds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from cwac_lab.config import INCIDENTAL
from cwac_lab.report.tables import ROW, SETTING, place
from cwac_lab.results import store
from cwac_lab.stats import Difference, holm, paired_difference, sign_flip_p

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
        shared = (key for key in row["config"] if key.startswith(_SHARED) and key not in INCIDENTAL)
        same = all(other["config"].get(key) == row["config"][key] for key in shared)
        return same and (other["harmful_ratio"], other["seed"]) == (row["harmful_ratio"], row["seed"])

    return next((other for other in rows if fits(other)), None)


def _outcomes(row: dict[str, Any], kind: str, field: str) -> dict[str, float]:
    """Return the outcome of every item that has one: incoherent answers have none."""
    verdicts = row["run"].read(store.VERDICTS) if row["run"].has(store.VERDICTS) else []
    found = [v for v in verdicts if v["kind"] == kind and v[field] is not None and not v.get("incoherent")]
    return {verdict["id"]: float(verdict[field]) for verdict in found}


def _compare(
    group: list[dict[str, Any]], rows: list[dict[str, Any]], kind: str, field: str, baseline: str
) -> tuple[Difference, float] | None:
    pairs = [(row, _partner(row, rows, baseline)) for row in group]
    outcomes = [(_outcomes(a, kind, field), _outcomes(b, kind, field)) for a, b in pairs if b is not None]
    if not outcomes:
        return None
    common = sorted(set.intersection(*(set(found) for pair in outcomes for found in pair)))
    if not common:
        return None
    ours, other = (np.array([[pair[side][item] for item in common] for pair in outcomes]) for side in (0, 1))
    return paired_difference(ours, other), sign_flip_p(ours, other)


def _adjust(table: list[dict[str, Any]]) -> None:
    """Replace every comparison by text; p-values are adjusted over the rows of one setting and harmful ratio."""
    for title in COMPARED:
        families: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for entry in table:
            if entry[title] is not None:
                families.setdefault(tuple(entry[key] for key in [*SETTING, "harmful_ratio"]), []).append(entry)
        for family in families.values():
            for entry, p in zip(family, holm([entry[title][1] for entry in family]), strict=True):
                entry[title] = f"{entry[title][0]} p={p:.2g}"
    for entry in table:
        entry |= {title: entry[title] or "" for title in COMPARED}


def differences(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Return one row a setting, harmful ratio, constraint and variant, with the differences of ``COMPARED`` as text.

    p-values are those of a sign-flip test, adjusted by Holm's method over the rows of one setting and harmful ratio.
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
    _adjust(table)
    table.sort(key=place)
    return pd.DataFrame(table)
