"""Paired differences: what a constraint changes on the very same prompts, rows and seeds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from cwac_lab.config import ALIKE
from cwac_lab.errors import LabError, one_of
from cwac_lab.evaluation.verdicts import outcomes
from cwac_lab.report.records import SETTING, Row, finished, grouped
from cwac_lab.stats import Difference, holm, paired_difference, sign_flip_p

# Column: the rate, and what is compared with.
COMPARED = {
    "FA - none": ("finetune_accuracy", "none"),
    "HS - none": ("harmful_score", "none"),
    "HS - start": ("harmful_score", "start"),
    "over-refusal - start": ("over_refusal", "start"),
    "over-refusal (look-alikes) - start": ("over_refusal_lookalike", "start"),
}
# Settings that two runs must share for their difference to be the constraint's, by what is compared with.
_ASKED = ("evaluation.max_new_tokens", "task.", "model.")
_SHARED = {"start": _ASKED, "none": (*_ASKED, "trainer.", "tuning.", "data.n_", "data.mixing")}


def _alike(row: Row, other: Row, baseline: str) -> bool:
    """Tell whether two runs share all settings that their difference is not to be due to."""
    # A start is compared with whatever is asked as it was, however that was trained.
    same = [name for name in (*SETTING, "asking") if baseline != "start" or name != "attack"]
    if any(other[key] != row[key] for key in same):
        return False
    shared = (key for key in row["config"] if key.startswith(_SHARED[baseline]) and key not in ALIKE)
    if any(other["config"].get(key, row["config"][key]) != row["config"][key] for key in shared):
        return False
    return baseline == "start" or (other["harmful_ratio"], other["seed"]) == (row["harmful_ratio"], row["seed"])


def _partner(row: Row, rows: list[Row], baseline: str) -> Row | None:
    """Return the run of the baseline that a run is compared with, or None where there is none."""
    return next((other for other in rows if other["constraint"] == baseline and _alike(row, other, baseline)), None)


def _compare(pairs: list[tuple[Row, Row]], rate: str) -> tuple[Difference, float] | None:
    """Return the difference on the items that count in all runs; a broken model has an accuracy, but no other rate."""
    outcomes_of = [
        (outcomes(a["verdicts"], rate), outcomes(b["verdicts"], rate))
        for a, b in pairs
        if rate == "finetune_accuracy" or not (a["broken"] or b["broken"])
    ]
    if not outcomes_of:
        return None
    common = sorted(set.intersection(*(set(found) for pair in outcomes_of for found in pair)))
    if not common:
        return None
    ours, other = (np.array([[float(pair[side][item]) for item in common] for pair in outcomes_of]) for side in (0, 1))
    return paired_difference(ours, other), sign_flip_p(ours, other)


def _against(group: list[Row], rows: list[Row], rate: str, baseline: str) -> tuple[Difference, float] | None:
    found = [(row, _partner(row, rows, baseline)) for row in group]
    return _compare([(row, other) for row, other in found if other is not None], rate)


def compare(ours: list[Row], other: list[Row], rate: str = "harmful_score") -> tuple[Difference, float]:
    """Return what one method has more of a rate than another on the same items and seeds, in points, and its p.

    p is that of the exact sign-flip test over items, not adjusted. Runs without a partner of the same seed, harmful
    ratio and training are left out.

    Args:
        ours: Records of one method (``records.records``), e.g. of ``results.select``.
        other: Records of the other.
        rate: ``harmful_score``, ``finetune_accuracy``, ``over_refusal`` or ``over_refusal_lookalike``.

    Raises:
        LabError: If two records of a method are one cell, or no pair is left to compare.
    """
    one_of("rate", rate, {rate for rate, _ in COMPARED.values()})
    pairs = []
    for row in finished(ours):
        partners = [each for each in finished(other) if _alike(row, each, "none")]
        if len(partners) > 1:
            raise LabError(f"{partners[0]['run'].path} and {partners[1]['run'].path} both pair with {row['run'].path}")
        pairs += [(row, partner) for partner in partners]
    if len({id(partner) for _, partner in pairs}) < len(pairs):
        raise LabError("two runs of one method pair with one of the other: narrow the choice")
    found = _compare(pairs, rate)
    if found is None:
        raise LabError(
            f"no two runs to compare {rate} of: pairs share seed, ratio, data and training, and are not broken"
        )
    return found


def _adjust(table: list[Row]) -> None:
    """Replace every comparison by text; p-values are adjusted over the rows of one setting and harmful ratio."""
    for title in COMPARED:
        families: dict[tuple[Any, ...], list[Row]] = {}
        for entry in table:
            if entry[title] is not None:
                families.setdefault(tuple(entry[key] for key in [*SETTING, "harmful_ratio"]), []).append(entry)
        for family in families.values():
            for entry, p in zip(family, holm([entry[title][1] for entry in family]), strict=True):
                entry[title] = f"{entry[title][0]} {'p<0.0001' if p < 1e-4 else f'p={p:.2g}'}"
    for entry in table:
        entry |= {title: entry[title] or "" for title in COMPARED}


def differences(rows: list[Row]) -> pd.DataFrame:
    """Return one row a setting, harmful ratio, constraint and variant, with the differences of ``COMPARED`` as text.

    p-values are those of the exact sign-flip test, adjusted by Holm's method over the rows of one setting and harmful
    ratio, each column by itself. Rows without a partner are left out; the number of seeds is that of pairs compared.
    """
    done, table = finished(rows), []
    for entry, group in grouped(rows):
        if entry["constraint"] in ("start", "none"):
            continue
        cells = {title: _against(finished(group), done, *how) for title, how in COMPARED.items()}
        if any(cells.values()):
            table.append({**entry, **cells})
    _adjust(table)
    return pd.DataFrame(table)
