"""The points of the page's figures: a row of the tables each, with its rates, those of its suites and categories."""

from __future__ import annotations

import math
from typing import Any

from cwac_lab.core.stats import Rate
from cwac_lab.report.grouping import Row, finished, grouped
from cwac_lab.report.rates import OF, higher_is_better, kinds_of, known, over, title
from cwac_lab.report.tables import heading, rate_of

# Digits that a figure keeps.
DIGITS = 4
# Rates that are told by category as well.
BY_CATEGORY = ("harmful_score", "retained_refusals", "over_refusal")
Categories = dict[str, list[str]]


def short(value: Any) -> Any:
    """Return a figure with ``DIGITS`` digits, None where it is no finite number."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def categories(rows: list[Row]) -> Categories:
    """Return the categories of each suite that any run was asked, in order; those of the own pool under no name."""
    found: dict[str, set[str]] = {"": set()}
    for row in finished(rows):
        for verdict in row["verdicts"]:
            of = found.setdefault(verdict.get("suite") or "", set())
            if verdict.get("category"):
                of.add(str(verdict["category"]))
    return {suite: sorted(names) for suite, names in found.items()}


def rates(rows: list[Row]) -> dict[str, dict[str, Any]]:
    """Return what the page calls each rate, in which direction it is better, and what it is taken over."""
    return {
        name: {
            "title": title(name), "higher": higher_is_better(name), "kinds": kinds_of(name),
            "base": base, "suite": suite,
        }
        for name in known(rows)
        for base, _, suite in (name.partition(OF),)
    }  # fmt: skip


def points(rows: list[Row]) -> list[dict[str, Any]]:
    """Return a point a row of the tables that has a finished run."""
    names, of_suites = known(rows), categories(rows)
    found = []
    for entry, group in grouped(rows):
        done = finished(group)
        if not done:
            continue
        variant = f" ({entry['variant']})" if entry["variant"] else ""
        found.append(
            {
                "setting": heading(entry),
                "method": f"{entry['constraint']}{variant}",
                "start": entry["constraint"] == "start",
                "ratio": entry["harmful_ratio"],
                "seeds": len(done),
                "runs": [row["run"].path.name for row in done],
                "broken": any(row["broken"] for row in done),
                "rates": {name: told(rate) for name in names if (rate := rate_of(done, name)).n},
                "categories": _by_category(done, of_suites),
            }
        )
    return found


def told(rate: Rate) -> dict[str, Any]:
    """Return a rate in a few digits."""
    return {part: short(value) for part, value in rate.to_dict().items()}


def _by_category(group: list[Row], of_suites: Categories) -> dict[str, dict[str, dict[str, Any]]]:
    """Return rates by the name of a rate and, below it, a category; those that no item counts for are left out."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for suite, names in of_suites.items():
        for base in BY_CATEGORY if names else ():
            name = f"{base}{OF}{suite}" if suite else base
            each = {category: over([row["verdicts"] for row in group], name, category) for category in names}
            there = {category: told(rate) for category, rate in each.items() if rate.n}
            if there:
                found[name] = there
    return found
