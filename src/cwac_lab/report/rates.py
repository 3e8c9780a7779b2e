"""The rates of tables by name: those of ``evaluation.metrics``, and those of named suites, called ``NAME/SUITE``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float

from cwac_lab.core.errors import ConfigError
from cwac_lab.core.stats import Rate, mean_rate
from cwac_lab.evaluation.metrics import METRICS, SHOWN, Judged, Metric
from cwac_lab.evaluation.verdicts import outcomes

# Where answers are more than a label: a mean in nats, no share of rows.
LOSS = "held_out_loss"
_LOSS = "loss on held-out answers, nats"
# Between the name of a rate and that of the suite that it is taken over.
OF = "/"
DOWN, UP = " ↓", " ↑"
# What the name of a column of n begins with.
COUNT = "n, "


def metric(name: str) -> Metric:
    """Return the rate of a name; that of a suite is the own pool's, over the prompts of the suite."""
    base, _, suite = name.partition(OF)
    own = METRICS[base]
    if not suite:
        return own
    return replace(own, name=name, heading=f"{own.heading}, {suite}", words=f"{own.words}, {suite}")


def counted(verdicts: Iterable[Judged], name: str, category: str | None = None) -> dict[tuple[str, str], bool]:
    """Return, by kind and id, the outcome of every item that counts for a rate.

    Args:
        verdicts: Those of one run. A row of a suite has its name as ``suite``; those of the own pool have none.
        name: Of the rate.
        category: Only items of this category.
    """
    base, _, suite = name.partition(OF)
    rows = (row for row in verdicts if (row.get("suite") or "") == suite)
    return outcomes([row for row in rows if category is None or row.get("category") == category], base)


def matrix(runs: Sequence[list[Judged]], name: str, category: str | None = None) -> Float[np.ndarray, "S N"]:
    """Return the outcomes of S runs on the N items that count in any of them; NaN where an item does not count."""
    found = [counted(verdicts, name, category) for verdicts in runs]
    items = sorted(set().union(*found))
    return np.array([[float(known.get(item, np.nan)) for item in items] for known in found]).reshape(
        len(runs), len(items)
    )


def over(runs: Sequence[list[Judged]], name: str, category: str | None = None) -> Rate:
    """Return the mean of a rate over runs, by their verdicts, with its interval (see ``stats.mean_rate``)."""
    return mean_rate(matrix(runs, name, category))


def checked(key: str, name: object) -> str:
    """Return the name of a rate.

    Raises:
        ConfigError: If there is no such rate; whether a suite was asked is told by records only.
    """
    base, of, suite = str(name).partition(OF)
    if base not in METRICS or bool(of) is not bool(suite):
        raise ConfigError(key, name, f"{' | '.join(METRICS)}, each also as NAME{OF}SUITE")
    return str(name)


def suites(verdicts: Iterable[Judged], kinds: Iterable[str]) -> list[str]:
    """Return the names of the suites that rows of some kinds are of, in the order in which they come."""
    wanted = set(kinds)
    return list(dict.fromkeys(str(row["suite"]) for row in verdicts if row.get("suite") and row["kind"] in wanted))


def known(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Return the names of the rates that tables of some records show: each of the own pool, then those of its suites.

    Args:
        rows: Records (``grouping.records``), whose metrics have the rates of suites by name.
    """
    found = dict.fromkeys(key for row in rows for key in row if OF in key and key.partition(OF)[0] in SHOWN)
    return [name for base in SHOWN for name in (base, *(key for key in found if key.partition(OF)[0] == base))]


def higher_is_better(name: str) -> bool:
    """Tell in which direction a rate is better; of a loss less is."""
    return name != LOSS and metric(name).higher_is_better


def title(name: str) -> str:
    """Return how tables call a rate, with its direction as a sign."""
    return (_LOSS if name == LOSS else metric(name).heading) + (UP if higher_is_better(name) else DOWN)


def count_title(name: str) -> str:
    """Return the column that stands after a rate: on how many prompts or rows it is."""
    return count_of(title(name))


def count_of(column: str) -> str:
    """Return the column of n that belongs to the column of a rate."""
    return COUNT + column.removesuffix(DOWN).removesuffix(UP)


def is_rate(column: str) -> bool:
    """Tell whether a column of a table is that of a rate: it ends with the sign of its direction."""
    return column.endswith((DOWN, UP))
