"""Paired differences: what a constraint changes on the very same prompts, rows and seeds."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from cwac_lab.config.run import ALIKE
from cwac_lab.core.errors import LabError
from cwac_lab.core.stats import Difference, holm, paired_difference, sign_flip_p
from cwac_lab.evaluation.metrics import METRICS, metric
from cwac_lab.report.grouping import OWN, ROW, SETTING, Row, finished, grouped
from cwac_lab.report.rates import OF, checked, counted, is_share, known
from cwac_lab.report.tables import heading

CAPTION = (
    "Points [95 % interval] on the same items and seeds; below zero is less than the other has. n: items in each of so "
    "many seeds. p: exact sign-flip test over items, Holm's correction within a comparison and harmful ratio."
)


def comparisons(rates: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return by column what is compared in it: a rate, and what with."""
    return {
        f"{metric(rate).heading} - {baseline}": (rate, baseline)
        for rate in rates
        if is_share(rate)
        for baseline in metric(rate).baselines
    }


# Settings that two runs must share for their difference to be the constraint's, by what is compared with.
_ASKED = ("evaluation.max_new_tokens", "task.", "model.")
_SHARED = {"start": _ASKED, "none": (*_ASKED, "trainer.", "tuning.", "guard.", "data.n_", "data.mixing")}


def alike(row: Row, other: Row, baseline: str, meant: Collection[str] = ()) -> bool:
    """Tell whether two runs share all settings that their difference is not to be due to, but for ``meant`` ones."""
    # A start is compared with whatever is asked as it was, however that was trained.
    same = [name for name in (*SETTING, "asking") if baseline != "start" or name != "attack"]
    if any(other[key] != row[key] for key in same) or set(unlike(row, other, baseline)) - set(meant):
        return False
    return baseline == "start" or (other["harmful_ratio"], other["seed"]) == (row["harmful_ratio"], row["seed"])


def unlike(row: Row, other: Row, baseline: str) -> list[str]:
    """Return the settings of training and asking that two runs must share to be compared, and in which they differ."""
    shared = (key for key in row["config"] if key.startswith(_SHARED[baseline]) and key not in ALIKE)
    return [key for key in shared if other["config"].get(key, row["config"][key]) != row["config"][key]]


def otherwise(row: Row, other: Row, baseline: str) -> str:
    """Return in which settings of training two runs that are compared all the same differ, with both values."""
    names = unlike(row, other, baseline)
    return ", ".join(f"{name} {row['config'][name]} and {other['config'][name]}" for name in names)


def _partners(row: Row, rows: list[Row], baseline: str) -> list[Row]:
    """Return the runs of the baseline that a run may be compared with: where it can be, those of its very settings.

    Settings of a constraint are not among them. Starts that were given another seed are one start.
    """
    fitting = [other for other in rows if other["constraint"] == baseline and alike(row, other, baseline)]
    exact = [other for other in fitting if len(fitting) > 1 and _differing(row, other) == []]
    found = exact or fitting
    return found[:1] if baseline == "start" and all(_one_start(found[0], other) for other in found) else found


def _differing(row: Row, other: Row) -> list[str]:
    """Return the settings, the constraint's left out, that both runs know and that differ."""
    known = [key for key in row["config"] if key in other["config"] and not key.startswith(OWN) and key not in ALIKE]
    return [key for key in known if row["config"][key] != other["config"][key]]


def _one_start(start: Row, other: Row) -> bool:
    """Tell whether two starts have the same settings, and the same outcome of all that is compared with starts."""
    rates = (rate for rate, baseline in comparisons(known([start, other])).values() if baseline == "start")
    alike = (counted(start["verdicts"], rate) == counted(other["verdicts"], rate) for rate in rates)
    return _differing(start, other) == [] and all(alike)


def outcomes_of_pairs(
    pairs: list[tuple[Row, Row]], rate: str
) -> tuple[list[tuple[str, str]], Float[np.ndarray, "S N"], Float[np.ndarray, "S N"]] | None:
    """Return the items that count for a rate in both runs of each of S pairs, and their outcomes on either side.

    None where no item does. A broken model has an accuracy, but no other rate: pairs with one are left out.
    """
    found = [(counted(a["verdicts"], rate), counted(b["verdicts"], rate)) for a, b in pairs if is_sound((a, b), rate)]
    common = sorted(set.intersection(*(set(said) for pair in found for said in pair))) if found else []
    if not common:
        return None
    ours, other = (np.array([[float(pair[side][item]) for item in common] for pair in found]) for side in (0, 1))
    return common, ours, other


def is_sound(pair: tuple[Row, Row], rate: str) -> bool:
    """Tell whether a rate says something of both runs: where a judge has a say, neither may be broken."""
    return not metric(rate).judged or not any(row["broken"] for row in pair)


def _compare(pairs: list[tuple[Row, Row]], rate: str) -> tuple[Difference, float] | None:
    """Return the difference on the items that count in all runs, and its p; None where there is no such item."""
    found = outcomes_of_pairs(pairs, rate)
    if found is None:
        return None
    _, ours, other = found
    return paired_difference(ours, other), sign_flip_p(ours, other)


def _against(group: list[Row], rows: list[Row], rate: str, baseline: str) -> tuple[Difference, float] | str | None:
    """Return what a row differs by from its baseline; words where a run has several baselines, None without any."""
    found = [(row, _partners(row, rows, baseline)) for row in group]
    for _, partners in found:
        if len(partners) > 1:
            names = " and ".join(partner["run"].path.name for partner in partners[:2])
            return f"n/a ({len(partners)} runs of {baseline} fit: {names})"
    return _compare([(row, partners[0]) for row, partners in found if partners], rate)


def _one_row(which: str, rows: list[Row]) -> list[Row]:
    """Return the finished runs of a method.

    Raises:
        LabError: If they are of more than one row of a table, so that their differences are not those of seeds.
    """
    groups = grouped(rows)
    if len(groups) > 1:
        told = [
            f"{heading(entry)} | ratio {entry['harmful_ratio']} | {entry['constraint']} {entry['variant']}".strip()
            for entry, _ in groups[:2]
        ]
        raise LabError(
            f"{which}: runs of {len(groups)} rows of a table, which are no seeds of one method: {'; '.join(told)} "
            "(accepted: runs that differ in their seed only)"
        )
    return finished(groups[0][1]) if groups else []


def compare(ours: list[Row], other: list[Row], rate: str = "harmful_score") -> tuple[Difference, float]:
    """Return what one method has more of a rate than another on the same items and seeds, in points, and its p.

    p is that of the exact sign-flip test over items, not adjusted; it takes the seeds as given, where the interval is
    over seeds and items. Runs without a partner of the same seed, harmful
    ratio and training are left out.

    Args:
        ours: Records of one method (``grouping.records``), e.g. of ``results.select``.
        other: Records of the other.
        rate: One of ``evaluation.metrics.METRICS``, or ``NAME/SUITE``.

    Raises:
        LabError: If the records of a method are not seeds of one row of a table, or no pair is left to compare.
    """
    checked("rate", rate)
    mine, theirs = _one_row("ours", ours), _one_row("other", other)
    pairs = [(row, partner) for row in mine for partner in theirs if alike(row, partner, "none")]
    found = _compare(pairs, rate)
    if found is None:
        raise LabError(
            f"no two runs to compare {rate} of: pairs share seed, ratio, data and training, and are not broken"
        )
    return found


def _adjusted(table: list[Row]) -> None:
    """Adjust every p over the rows of one setting, comparison and harmful ratio."""
    families: dict[tuple[Any, ...], list[Row]] = {}
    for entry in table:
        if entry["p"] is not None:
            family = tuple(entry[key] for key in [*SETTING, "comparison", "harmful_ratio"])
            families.setdefault(family, []).append(entry)
    for rows in families.values():
        for entry, p in zip(rows, holm([entry["p"] for entry in rows]), strict=True):
            entry["p"] = p


def shown_p(p: float) -> str:
    """Return a p-value as text."""
    return "<0.0001" if p < 1e-4 else f"{p:.2g}"


def _found(rows: list[Row], columns: Sequence[str]) -> list[Row]:
    """Return the rows of ``differences`` with ``found``, the difference and its p or words, and with the adjusted p."""
    done, table = finished(rows), []
    cells = [cell for cell in grouped(rows) if cell[0]["constraint"] not in ("start", "none")]
    chosen = [rate for rate in columns if rate in METRICS or OF in rate] if columns else known(rows)
    for comparison, (rate, baseline) in comparisons(chosen).items():
        for entry, group in cells:
            found = _against(finished(group), done, rate, baseline)
            if found is not None:
                setting = {key: entry[key] for key in SETTING}
                told = {"found": found, "rate": rate, "baseline": baseline}
                p = None if isinstance(found, str) else found[1]
                table.append({**setting, "comparison": comparison, **entry, **told, "p": p})
    _adjusted(table)
    return table


def differences(rows: list[Row], columns: Sequence[str] = ()) -> pd.DataFrame:
    """Return one row a setting, comparison, harmful ratio, constraint and variant, as text.

    p-values are those of the exact sign-flip test, which takes the seeds as given (the intervals are over seeds and
    items), adjusted by Holm's method over the rows of one setting, comparison and harmful ratio.
    Rows without a partner are left out; the number of seeds is that of pairs compared.
    Where several runs of a baseline fit one run, that of its very settings counts; if it has none or several, the cell
    says so.

    Args:
        rows: Records.
        columns: Rates to compare; by default all that have a baseline.
    """
    table = []
    for row in _found(rows, columns):
        entry = {key: value for key, value in row.items() if key not in ("found", "rate", "baseline", "p")}
        if isinstance(row["found"], str):
            told = {"difference": row["found"], "p": "", "n": "", "seeds": ""}
        else:
            difference, _ = row["found"]
            told = {"difference": str(difference), "p": shown_p(row["p"]), "n": difference.n, "seeds": difference.seeds}
        table.append(entry | told)
    return pd.DataFrame(table)


def differences_in_numbers(rows: list[Row], columns: Sequence[str] = ()) -> pd.DataFrame:
    """Return the same rows with one number a cell: the difference and its bounds in points, both p, n and seeds.

    Where several runs of a baseline fit, so that there is no difference, no row is there.
    """
    table = []
    for row in _found(rows, columns):
        if isinstance(row["found"], str):
            continue
        difference, p = row["found"]
        entry = {key: row[key] for key in (*SETTING, *ROW, "rate", "baseline")}
        told = {"difference": difference.value, "difference_low": difference.low, "difference_high": difference.high}
        table.append(entry | told | {"p": p, "p_holm": row["p"], "n": difference.n, "seeds": difference.seeds})
    return pd.DataFrame(table)
