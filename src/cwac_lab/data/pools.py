"""Prompt pools: alignment, reference, finetune, validation, test. No prompt is in two of them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cwac_lab.data.sources import DataConfig, PromptRow, TaskData, load_prompts, normalise, split_task
from cwac_lab.data.tasks.base import Task
from cwac_lab.errors import ConfigError, PoolOverlap

POOLS = ("alignment", "reference", "finetune", "validation", "test")
KINDS = ("harmful", "harmless", "lookalike")


@dataclass(frozen=True)
class Pools:
    """Prompts by kind (harmful, harmless, lookalike) and pool."""

    rows: dict[str, dict[str, list[PromptRow]]]

    def get(self, kind: str, pool: str) -> list[PromptRow]:
        """Return the prompts of a kind in a pool, in their drawn order (empty where the config gives none)."""
        return self.rows.get(kind, {}).get(pool, [])

    def task_rows(self, data: DataConfig, task: Task) -> TaskData:
        """Return a task's rows, split, without those whose prompt a pool holds (see ``sources.split_task``)."""
        return split_task(data, task, self.prompts())

    def prompts(self) -> set[str]:
        """Return all prompts of all pools, normalised."""
        return {normalise(row.prompt) for pools in self.rows.values() for rows in pools.values() for row in rows}

    def manifest(self) -> dict[str, dict[str, list[str]]]:
        """Return the ids of all prompts, by kind and pool."""
        return {
            kind: {pool: [row.id for row in rows] for pool, rows in pools.items()} for kind, pools in self.rows.items()
        }


def assert_disjoint(pools: Mapping[str, Iterable[PromptRow]]) -> None:
    """Raise ``PoolOverlap`` naming a prompt id if two pools share a prompt."""
    owner: dict[str, tuple[str, str]] = {}
    for pool, rows in pools.items():
        for row in rows:
            name = normalise(row.prompt)
            other, other_id = owner.setdefault(name, (pool, row.id))
            if other != pool:
                raise PoolOverlap(f"prompt {row.id} of pool {pool} is also {other_id} of pool {other}")


def _draw(
    kind: str, plan: dict[str, dict[str, int]], lists: dict[str, list[PromptRow]], seed: int
) -> dict[str, list[PromptRow]]:
    """Deal shuffled lists out to pools in the order of POOLS; a prompt already dealt from another list is left out."""
    decks = {}
    for name, rows in lists.items():
        decks[name] = sorted(rows, key=lambda row: row.id)
        random.Random(f"{seed}/{name}").shuffle(decks[name])
    dealt: set[str] = set()
    pools: dict[str, list[PromptRow]] = {}
    for pool in POOLS:
        for name, count in plan.get(pool, {}).items():
            hand = pools.setdefault(pool, [])
            while count and decks[name]:
                row = decks[name].pop()
                identity = normalise(row.prompt)
                if identity not in dealt:
                    dealt.add(identity)
                    hand.append(row)
                    count -= 1
            if count:
                held = f"at most {plan[pool][name] - count} (the list is used up)"
                raise ConfigError(f"data.{kind}.{pool}.{name}", plan[pool][name], held)
    return pools


def check_plan(data: DataConfig) -> None:
    """Check the pools' plan without reading any file.

    Raises:
        ConfigError: If a pool or list is unknown or a count negative.
    """
    for kind in KINDS:
        for pool, parts in getattr(data, kind).items():
            if pool not in POOLS:
                raise ConfigError(f"data.{kind}", pool, " | ".join(POOLS))
            for name, count in parts.items():
                if name not in data.lists:
                    raise ConfigError(f"data.{kind}.{pool}", name, " | ".join(data.lists))
                if count < 0:
                    raise ConfigError(f"data.{kind}.{pool}.{name}", count, "an integer >= 0")


def build_pools(data: DataConfig) -> Pools:
    """Read the prompt lists and deal them out; depends on ``data.split_seed`` only, not on the run's seed.

    Raises:
        ConfigError: If a list is too short for its plan.
        PoolOverlap: If, in spite of the dealing, two pools share a prompt.
    """
    check_plan(data)
    root = Path(data.root) if data.root is not None else None
    used = {name for kind in KINDS for parts in getattr(data, kind).values() for name in parts}
    lists = {name: load_prompts(data.source, data.lists[name], root, name) for name in sorted(used)}
    rows = {kind: _draw(kind, getattr(data, kind), lists, data.split_seed) for kind in KINDS}
    assert_disjoint({f"{kind}/{pool}": held for kind, pools in rows.items() for pool, held in pools.items()})
    return Pools(rows)
