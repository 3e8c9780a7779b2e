"""Rows of a user's own in three parts: to train on, to tune on, to test on."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Collection, Sequence

from cwac_lab.core.errors import ConfigError
from cwac_lab.data.folding import normalise
from cwac_lab.data.tasks.base import TaskData, TaskRow

# Share of a task's own rows that is held out where it has no test rows.
HELD_OUT = 0.1


def part(
    rows: list[TaskRow],
    test: list[TaskRow] | None,
    taken: Collection[str],
    *,
    n_validation: int,
    n_test: int,
    seed: int,
) -> TaskData:
    """Split rows: conversations that begin with the same prompt stay within one part.

    So no answer of a test row is learned, where rows go on with one another.

    Args:
        rows: Rows to train on, in the order of the file.
        test: Rows to test on; None: a tenth of the others, at most ``n_test``.
        taken: Prompts that are used otherwise, normalised; rows that ask one of them are left out.
        n_validation: Rows to tune on, at most.
        n_test: Rows to test on, at most.
        seed: Draws the parts.

    Raises:
        ConfigError: If no row is left to train on or to test on.
    """
    remarks: list[str] = []
    rows = _free(rows, taken, "rows to train on", remarks)
    sizes = Counter(map(_first, rows))
    drawn = random.Random(seed).sample(list(sizes), len(sizes))
    if test is None:
        n = min(n_test, math.ceil(HELD_OUT * len(rows)))
        held = _chosen(drawn, sizes, n)
        test = _sample([row for row in rows if _first(row) in held], n, seed)
        remarks.append(f"{len(test)} of {len(rows)} rows are held out to test on{_more(sizes, held, len(test))}")
    else:
        given = _free(test, taken, "rows to test on", remarks)
        test = _sample(given, n_test, seed)
        if len(test) < len(given):
            remarks.append(f"{n_test} of {len(given)} rows to test on are asked, drawn (data.n_test)")
        held = set(map(_first, test))
        if alike := sum(sizes[first] for first in held):
            remarks.append(f"{alike} of {len(rows)} rows to train on are left out: they begin as a row to test on does")
    others = [first for first in drawn if first not in held]
    chosen = _chosen(others, sizes, n_validation)
    learned = set(others) - chosen
    if others and n_validation and not (chosen and learned):
        accepted = f"0, or fewer than the rows to train on ({len(others)} prompts that they begin with are left)"
        raise ConfigError("data.n_validation", n_validation, accepted)
    if not learned or not test:
        few = f"{len(rows)} rows to train on that begin with {len(sizes)} prompts, {len(test)} to test on"
        raise ConfigError("data.n_test", n_test, f"at least one prompt for each part ({few})")
    tuned, trained = ([row for row in rows if _first(row) in firsts] for firsts in (chosen, learned))
    kept = _sample(tuned, n_validation, seed)
    if chosen:
        remarks.append(f"{len(kept)} rows are held out to tune on{_more(sizes, chosen, len(kept))}")
    return TaskData(trained, kept, test, remarks)


def _first(row: TaskRow) -> str:
    return normalise(row.prompts[0])


def _free(rows: list[TaskRow], taken: Collection[str], words: str, remarks: list[str]) -> list[TaskRow]:
    """Return the rows that ask nothing that is used otherwise, and tell how many do."""
    free = [row for row in rows if not any(normalise(prompt) in taken for prompt in row.prompts)]
    if len(free) < len(rows):
        remarks.append(f"{len(rows) - len(free)} of {len(rows)} {words} are left out: they ask what a prompt list asks")
    return free


def _more(sizes: Counter[str], held: Collection[str], kept: int) -> str:
    """Return in words how many rows more begin as those that were held out do."""
    others = sum(sizes[first] for first in held) - kept
    return f"; {others} others that begin as they do are left out" if others else ""


def _sample(rows: list[TaskRow], n: int, seed: int) -> list[TaskRow]:
    """Return at most ``n`` rows, drawn and in their order: a file may be sorted."""
    if len(rows) <= n:
        return rows
    return [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), n))]


def _chosen(drawn: Sequence[str], sizes: Counter[str], n: int) -> set[str]:
    """Return prompts that at most ``n`` rows begin with, the first ones that fit: a frequent one stays in training.

    Where none fits it is the rarest one, of which more than ``n`` rows begin, unless it is the only one.
    """
    chosen: set[str] = set()
    for first in drawn if n else ():
        if sizes[first] <= n:
            chosen.add(first)
            n -= sizes[first]
    if not chosen and n and len(drawn) > 1:
        return {min(drawn, key=sizes.__getitem__)}
    return chosen
