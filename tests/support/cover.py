"""Tables over several factors: a cover of the product is tried always, the rest of it before a release."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import combinations, count, product
from math import gcd, lcm

import pytest


def cover(sizes, strength=1):
    """Choose few rows of a product of factors so that all values of any ``strength`` factors occur together.

    Args:
        sizes: How many values each factor has.
        strength: 1 for every value, 2 for every pair of values of two factors, and so on.

    Returns:
        Rows of places of values; with strength 1 as many as the longest factor has values. Greedy, so not always the
        fewest there are; always the same.
    """
    groups = list(combinations(range(len(sizes)), strength))
    rows, used = list(product(*map(range, sizes))), Counter()

    def parts(row):
        return {(group, tuple(row[i] for i in group)) for group in groups}

    left, chosen = set().union(*map(parts, rows)), []
    while left:
        # Of rows that add as much the one whose values are used least, so that single values take turns.
        worn = {row: sum(used[each] for each in enumerate(row)) if strength == 1 else 0 for row in rows}
        best = max(rows, key=lambda row: (len(parts(row) & left), -worn[row]))
        chosen.append(best)
        used.update(enumerate(best))
        left -= parts(best)
    return chosen


def table(strength=1, turn=0, every=1, **factors: Iterable):
    """Parametrize a test over all combinations; those beyond ``cover`` are exhaustive.

    Args:
        strength: That of ``cover``.
        turn: Tests of the same factors get other pairs of values by another turn.
        every: Of the rows of the cover every so many is in the fast set; the others are slow.
        factors: The values of each argument; names of a mapping.
    """
    values = [list(each) for each in factors.values()]
    kept = {
        tuple((place + number * turn) % len(values[number]) for number, place in enumerate(row))
        for row in cover([len(each) for each in values], strength)
    }
    # Where the short factors come round as the fast rows do, each turn of them begins a row later.
    turns, round_of = count(), lcm(*map(len, values[1:]))
    shifts = gcd(round_of, every) > 1
    rows = []
    for row in product(*(range(len(each)) for each in values)):
        chosen = [each[place] for each, place in zip(values, row, strict=True)]
        mark = pytest.mark.exhaustive
        if row in kept:
            turn_of = next(turns)
            mark = pytest.mark.slow if (turn_of + shifts * (turn_of // round_of)) % every else ()
        rows.append(pytest.param(*chosen, id="-".join(map(_word, factors, chosen, row)), marks=mark))
    return pytest.mark.parametrize(list(factors), rows)


def some(rows, *kept, others="exhaustive"):
    """Return the rows of a test of which only some are in the fast set; the others have another mark."""
    rows = list(rows)
    assert all(row in rows for row in kept), "a row that is kept is one of them"
    return [
        pytest.param(
            *(row if isinstance(row, tuple) else (row,)), marks=() if row in kept else getattr(pytest.mark, others)
        )
        for row in rows
    ]


def beyond(rows):
    """Return further rows of a test as exhaustive ones."""
    return [pytest.param(*row, marks=pytest.mark.exhaustive) for row in rows]


def _word(name, value, place):
    return str(value) if isinstance(value, str | int | float) else f"{name}{place}"
