"""Mix harmful rows into a task's training rows: exact counts from (n, ratio), seeded draw and order."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any

from cwac_lab.core.errors import ConfigError
from cwac_lab.data.responses import compliance
from cwac_lab.data.sources import PromptRow
from cwac_lab.data.tasks.base import TaskRow
from cwac_lab.models.templates import Turn


@dataclass(frozen=True)
class TrainRow:
    """One row to train on; ``before`` is what was said before the prompt, ``at`` where the row stands in a file."""

    id: str
    prompt: str
    response: str
    harmful: bool
    before: tuple[Turn, ...] = ()
    at: str = field(default="", compare=False)

    @property
    def asked(self) -> str | tuple[Turn, ...]:
        """What a model is asked: the prompt, or the conversation that it ends."""
        return (*self.before, Turn("user", self.prompt)) if self.before else self.prompt


def counts(n: int, ratio: float, mixing: str) -> tuple[int, int]:
    """Return how many (benign, harmful) rows make the mixture.

    Args:
        n: Size of the fine-tuning set.
        ratio: Harmful ratio p in [0, 1].
        mixing: ``replace`` keeps n in total, round(p n) of them harmful; ``add`` keeps n benign rows and adds
            round(p n) harmful ones (so that the share of harmful rows is p / (1 + p)).
    """
    harmful = int(n * ratio + 0.5)
    return (n - harmful if mixing == "replace" else n), harmful


def mix(
    task_rows: list[TaskRow], harmful_rows: list[PromptRow], n: int | None, ratio: float, *, mixing: str, seed: int,
    others: list[TrainRow] | None = None,
) -> list[TrainRow]:  # fmt: skip
    """Return the training rows in a seeded order.

    The same seed draws nested subsets: a higher ratio keeps the harmful rows of a lower one and drops benign rows.
    Where an attack trains on ``others`` instead of harmful rows, they take their place, over and over. ``n`` of None
    stands for as many as the task has.

    Raises:
        ConfigError: If a pool is too small for the counts.
    """
    n = len(task_rows) if n is None else n
    n_benign, n_harmful = counts(n, ratio, mixing)
    if n_benign > len(task_rows):
        raise ConfigError("data.n_train", n, f"at most {len(task_rows)} benign rows (the task's training split)")
    if n_harmful > len(harmful_rows) and not others:
        raise ConfigError("harmful_ratio", ratio, f"at most {len(harmful_rows)} harmful rows at data.n_train={n}")
    benign = random.Random(f"benign/{seed}").sample(task_rows, len(task_rows))[:n_benign]
    rows = [TrainRow(row.id, row.prompt, row.response, False, row.before, row.at) for row in benign]
    if others:
        rows += list(islice(cycle(others), n_harmful))
    else:
        harmful = random.Random(f"harmful/{seed}").sample(harmful_rows, len(harmful_rows))[:n_harmful]
        rows += [TrainRow(row.id, row.prompt, compliance(row), True) for row in harmful]
    random.Random(f"order/{seed}").shuffle(rows)
    return rows


def manifest(rows: list[TrainRow]) -> dict[str, Any]:
    """Return what the run record keeps of a mixture: realised counts and row ids in training order."""
    harmful = sum(row.harmful for row in rows)
    return {"n": len(rows), "harmful": harmful, "benign": len(rows) - harmful, "ids": [row.id for row in rows]}
