"""The rates of tables by name: those of ``evaluation.metrics``, and those of named suites, called ``NAME/SUITE``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from cwac_lab.core.errors import ConfigError
from cwac_lab.core.stats import Rate, mean_rate
from cwac_lab.evaluation.combined import CONTRAST, Combined, combined_of, described
from cwac_lab.evaluation.combined import matrix as outcome_matrix
from cwac_lab.evaluation.metrics import METRICS, POOLED, REFUSED, SHOWN, Judged
from cwac_lab.evaluation.verdicts import HARMFULNESS, outcomes

LOSS = "held_out_loss"
# Means, no shares of rows: in nats, where answers are more than a label; in percent, where a judge tells it.
MEANS = {LOSS: "loss on held-out answers, nats", HARMFULNESS: "harmfulness"}
# Between the name of a rate and that of the suite that it is taken over.
OF = "/"
DOWN, UP = " ↓", " ↑"
# What the name of a column of n begins with.
COUNT = "n, "


def counted(verdicts: Sequence[Judged], name: str, category: str | None = None) -> dict[tuple[str, str], bool]:
    """Return, by kind and id, the outcome of every item that counts for a rate.

    Args:
        verdicts: Those of one run.
        name: Of the rate.
        category: Only items of this category.
    """
    return outcomes(_of(verdicts, category), name)


def matrix(runs: Sequence[Sequence[Judged]], name: str, category: str | None = None) -> Float[np.ndarray, "S N"]:
    """Return the outcomes of S runs on the N items that count in any of them; NaN where an item does not count."""
    return outcome_matrix([_of(verdicts, category) for verdicts in runs], name)


def _of(verdicts: Sequence[Judged], category: str | None) -> Sequence[Judged]:
    return verdicts if category is None else [row for row in verdicts if row.get("category") == category]


def over(runs: Sequence[Sequence[Judged]], name: str, category: str | None = None) -> Rate:
    """Return the mean of a rate over runs, by their verdicts, with its interval (see ``stats.mean_rate``).

    What is made of several rates (``evaluation.combined``) has the interval of its own; by category there is none.
    """
    if is_share(name):
        return mean_rate(matrix(runs, name, category))
    told = [combined_of(verdicts).get(name) for verdicts in runs] if category is None else []
    made = told[0] if told and all(each == told[0] for each in told) else None  # runs of other suites have no mean
    return Rate(None, None, None, 0) if made is None else made.rate(runs)


def is_share(name: str) -> bool:
    """Tell whether a rate is a share of answers, and not made of several rates."""
    return not isinstance(described(name), Combined)


def kinds_of(name: str) -> tuple[str, ...]:
    """Return the kinds of prompts that a rate is over; of a contrast, which is over both, none."""
    found, base = described(name), name.partition(OF)[0]
    if isinstance(found, Combined):
        return METRICS[base].kinds if base in METRICS else ()
    return found.kinds


def checked(key: str, name: object, *, made: bool = False) -> str:
    """Return the name of a rate; with ``made`` also of one that is made of several.

    Raises:
        ConfigError: If there is no such rate; whether a suite was asked is told by records only.
    """
    base, of, suite = str(name).partition(OF)
    combined = suite == POOLED or base == CONTRAST
    there = base in METRICS or (base in (REFUSED.name, CONTRAST) and suite)
    if not there or (combined and not made) or bool(of) is not bool(suite):
        raise ConfigError(key, name, f"{' | '.join(METRICS)}, each also as NAME{OF}SUITE")
    return str(name)


def suites(verdicts: Iterable[Judged], kinds: Iterable[str]) -> list[str]:
    """Return the names of the suites that rows of some kinds are of, in the order in which they come."""
    wanted = set(kinds)
    return list(dict.fromkeys(str(row["suite"]) for row in verdicts if row.get("suite") and row["kind"] in wanted))


def known(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Return the names of the rates that tables of some records show: each of the own pool, then those of its suites.

    A mean over suites is there where all records that have one were asked the same suites.

    Args:
        rows: Records (``grouping.records``), whose metrics have the rates of suites by name.
    """
    rows = list(rows)
    there = dict.fromkeys(key for row in rows for key in row if OF in key and described(key).shown)
    found = [name for name in there if len(means_of(rows, name)) < 2]
    own = [name for base in SHOWN for name in (base, *(key for key in found if key.partition(OF)[0] == base))]
    return [*own, *(key for key in found if key not in own)]


def means_of(rows: Iterable[dict[str, Any]], name: str) -> set[tuple[str, ...]]:
    """Return the rates that a figure made of several is made of in records that have it; they may differ."""
    if is_share(name):
        return set()
    made = (combined_of(row["verdicts"]).get(name) for row in rows if name in row and "verdicts" in row)
    return {tuple(each.weights) for each in made if each is not None}


def higher_is_better(name: str) -> bool:
    """Tell in which direction a rate is better; of a loss, and of harmfulness, less is."""
    return name not in MEANS and described(name).higher_is_better


def title(name: str) -> str:
    """Return how tables call a rate, with its direction as a sign."""
    return (MEANS.get(name) or described(name).heading) + (UP if higher_is_better(name) else DOWN)


def count_title(name: str) -> str:
    """Return the column that stands after a rate: on how many prompts or rows it is."""
    return count_of(title(name))


def count_of(column: str) -> str:
    """Return the column of n that belongs to the column of a rate."""
    return COUNT + column.removesuffix(DOWN).removesuffix(UP)


def is_rate(column: str) -> bool:
    """Tell whether a column of a table is that of a rate: it ends with the sign of its direction."""
    return column.endswith((DOWN, UP))
