"""Prompt pools: alignment, reference, finetune, validation, test. No prompt is in two of them, nor a near-duplicate.

The alignment pool is the shipped lists (``taught``) unless a plan names one of its own. Whoever deals the other pools
deals after it, in every run, whether its model is aligned here or not.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cwac_lab.core.errors import ConfigError, PoolOverlap
from cwac_lab.data.near import groups, templated, told_apart
from cwac_lab.data.sources import DataConfig, PromptRow, TaskData, load_prompts, normalise, split_task
from cwac_lab.data.tasks.base import Task
from cwac_lab.data.taught import POOL as ALIGNMENT
from cwac_lab.data.taught import taught

POOLS = ("alignment", "reference", "finetune", "validation", "test")
# Kinds by the answer that is wanted. Among kinds of one answer near-duplicates are kept in one pool: what is learnt on
# one of them tells the answer to the other. A look-alike may be near a harmful prompt, whose contrast it is meant to
# be: its answer is another, so nothing is given away; only equal text is an error there.
ANSWERS = (("harmful",), ("harmless", "lookalike"))
KINDS = tuple(kind for kinds in ANSWERS for kind in kinds)
Lists = Mapping[str, list[PromptRow]]
Plan = Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class Pools:
    """Prompts by kind (harmful, harmless, lookalike) and pool.

    Attributes:
        rows: The prompts.
        cut: By setting of the plan (``data.harmful.test.NAME``), what near-duplicates left less of than planned:
            ``dealt`` and ``planned`` prompts.
        alike: By list, how many of its prompts are of one template, so that equal text only keeps them apart.
        shipped: Whether the alignment pools are the shipped lists, no plan's.
    """

    rows: dict[str, dict[str, list[PromptRow]]]
    cut: dict[str, dict[str, int]] = field(default_factory=dict)
    alike: dict[str, int] = field(default_factory=dict)
    shipped: bool = False

    def get(self, kind: str, pool: str) -> list[PromptRow]:
        """Return the prompts of a kind in a pool, in their drawn order (empty where the config gives none)."""
        return self.rows.get(kind, {}).get(pool, [])

    def task_rows(self, data: DataConfig, task: Task) -> TaskData:
        """Return a task's rows, split, without those whose prompt a pool holds (see ``sources.split_task``).

        That is by equal text: rows that are only near a prompt stay. The prompts of a task are mostly one instruction.
        """
        return split_task(data, task, self.prompts())

    def harmful(self) -> list[str]:
        """Return all harmful prompts of all pools, and those that a start is taught to refuse."""
        rows = [row for held in self.rows.get("harmful", {}).values() for row in held]
        return [row.prompt for row in (*rows, *taught()["harmful"])]

    def prompts(self) -> set[str]:
        """Return all prompts of all pools, normalised."""
        return {normalise(row.prompt) for pools in self.rows.values() for rows in pools.values() for row in rows}

    def manifest(self) -> dict[str, dict[str, list[str]]]:
        """Return the ids of all prompts that a plan dealt, by kind and pool; shipped lists are part of the start."""
        left_out = ALIGNMENT if self.shipped else None
        return {
            kind: {pool: [row.id for row in rows] for pool, rows in pools.items() if pool != left_out}
            for kind, pools in self.rows.items()
        }

    def told(self) -> list[str]:
        """Return a line for every list of the plan that was cut, and for every list of one template."""
        alike = [
            f"data.lists.{name}: {count} prompts are near-duplicates of each other, as of one template: "
            "only equal text is kept out of other pools"
            for name, count in self.alike.items()
        ]
        return alike + [
            f"{key}: {count['dealt']} of {count['planned']} prompts, the others are near-duplicates of other pools'"
            for key, count in self.cut.items()
        ]


def assert_disjoint(pools: Mapping[str, Iterable[PromptRow]], near: str = "ngram", alike: Collection[str] = ()) -> None:
    """Raise ``PoolOverlap`` naming a prompt id if two pools share a prompt, or near-duplicates by the rule ``near``.

    The prompts ``alike`` are of a template: of them only equal ones count.
    """
    held = [(pool, row) for pool, rows in pools.items() for row in rows]
    group_of = told_apart(groups([row.prompt for _, row in held], near), alike)
    owner: dict[int, tuple[str, PromptRow]] = {}
    for pool, row in held:
        other, twin = owner.setdefault(group_of[row.prompt], (pool, row))
        if other != pool:
            word = "also" if normalise(twin.prompt) == normalise(row.prompt) else "a near-duplicate of"
            raise PoolOverlap(f"prompt {row.id} of pool {pool} is {word} {twin.id} of pool {other}")


def _decks(lists: Lists, seed: int, group_of: Mapping[str, int]) -> dict[str, list[PromptRow]]:
    """Return the lists shuffled, to be dealt from the end; what is of one group lies where its first prompt does."""
    decks = {}
    for name, rows in lists.items():
        deck = sorted(rows, key=lambda row: row.id)
        random.Random(f"{seed}/{name}").shuffle(deck)
        place = {group_of[row.prompt]: number for number, row in enumerate(deck)}
        decks[name] = sorted(deck, key=lambda row: place[group_of[row.prompt]])
    return decks


def _deal(
    plan: Plan, lists: Lists, seed: int, group_of: Mapping[str, int], owner: dict[int, str],
    taken: Collection[str] = (),
) -> tuple[dict[str, list[PromptRow]], dict[tuple[str, str], int]]:  # fmt: skip
    """Deal shuffled lists out to pools in the order of POOLS; every group goes to the pool that its first prompt does.

    A prompt already dealt from another list is left out, and so is one whose group is another pool's.

    Args:
        plan: How many prompts of which list each pool takes.
        lists: The prompts.
        seed: Seed of the shuffles.
        group_of: Group of every prompt.
        owner: Pool of the groups dealt so far; those dealt here are added.
        taken: Normalised prompts that are no longer there to be dealt.

    Returns:
        Prompts by pool, and how many were dealt by pool and list where these are less than planned.
    """
    decks = _decks(lists, seed, group_of)
    dealt = set(taken)
    pools: dict[str, list[PromptRow]] = {}
    short = {}
    for pool in POOLS:
        for name, count in plan.get(pool, {}).items():
            hand: list[PromptRow] = []
            deck = decks[name]
            deck.sort(key=lambda row: owner.get(group_of[row.prompt]) == pool)  # first what only this pool may take
            later: list[PromptRow] = []  # what only another pool may take
            while deck and len(hand) < count:
                row = deck.pop()
                identity = normalise(row.prompt)
                if owner.get(group_of[row.prompt], pool) != pool:
                    later.append(row)
                elif identity not in dealt:
                    owner[group_of[row.prompt]] = pool
                    dealt.add(identity)
                    hand.append(row)
            deck.extend(reversed(later))
            pools.setdefault(pool, []).extend(hand)
            if len(hand) < count:
                short[pool, name] = len(hand)
    return pools, short


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


def _check_lists(kind: str, plan: Plan, lists: Lists, seed: int) -> None:
    """Check that the lists are long enough for a plan where only equal text is kept apart."""
    _, short = _deal(plan, lists, seed, groups([row.prompt for rows in lists.values() for row in rows], "exact"), {})
    for (pool, name), held in short.items():
        raise ConfigError(f"data.{kind}.{pool}.{name}", plan[pool][name], f"at most {held} (the list is used up)")


def _cut(kind: str, plan: Plan, near: str, short: Mapping[tuple[str, str], int]) -> dict[str, dict[str, int]]:
    """Return ``Pools.cut`` of a kind; a pool that was to hold prompts and has none is an error."""
    for pool in {pool for pool, _ in short}:
        name, count = next((name, count) for name, count in plan[pool].items() if count)
        if not any(short.get((pool, each), count) for each, count in plan[pool].items()):
            accepted = f"a list that is not all near-duplicates of other pools' prompts (data.near={near})"
            raise ConfigError(f"data.{kind}.{pool}.{name}", count, accepted)
    return {
        f"data.{kind}.{pool}.{name}": {"dealt": dealt, "planned": plan[pool][name]}
        for (pool, name), dealt in short.items()
    }


def build_pools(data: DataConfig) -> Pools:
    """Read the prompt lists and deal them out; depends on ``data.split_seed`` only, not on the run's seed.

    Raises:
        ConfigError: If a list is too short for its plan, or near-duplicates leave a pool empty.
        MissingAsset: If a list is not there, or the package that ``data.near=embedding`` needs.
        PoolOverlap: If kinds of other answers share a prompt; or if, in spite of the dealing, two pools do.
    """
    check_plan(data)
    root = Path(data.root) if data.root is not None else None
    names = {kind: {name for parts in getattr(data, kind).values() for name in parts} for kind in KINDS}
    every_name = sorted(set().union(*names.values()))
    lists = {name: load_prompts(data.source, data.lists[name], root, name, data.max_line) for name in every_name}
    shipped = not any(ALIGNMENT in getattr(data, kind) for kind in KINDS)
    before = taught() if shipped else {}
    taken = {normalise(row.prompt) for held in before.values() for row in held}
    rows: dict[str, dict[str, list[PromptRow]]] = {}
    cut: dict[str, dict[str, int]] = {}
    alike: dict[str, int] = {}
    for kinds in ANSWERS:
        used = {kind: {name: lists[name] for name in sorted(names[kind])} for kind in kinds}
        for kind in kinds:
            _check_lists(kind, getattr(data, kind), used[kind], data.split_seed)
        first = [row.prompt for kind in kinds for row in before.get(kind, [])]
        every = [row.prompt for held in used.values() for deck in held.values() for row in deck]
        group_of = groups(first + every, data.near)
        decks = {name: [row.prompt for row in lists[name]] for held in used.values() for name in held}
        of_template = templated(decks, group_of) if data.near != "exact" else {}
        same = set[str]().union(*of_template.values())
        held = {name: len(same & set(prompts)) for name, prompts in decks.items()}
        alike |= {name: count for name, count in held.items() if count}
        group_of = told_apart(group_of, same)
        owner = {group_of[prompt]: ALIGNMENT for prompt in first}
        for kind in kinds:
            plan = getattr(data, kind)
            dealt, short = _deal(plan, used[kind], data.split_seed, group_of, owner, taken)
            rows[kind] = {ALIGNMENT: before[kind], **dealt} if shipped else dealt
            cut |= _cut(kind, plan, data.near, short)
        held_by = {pool: [row for kind in kinds for row in rows[kind].get(pool, [])] for pool in POOLS}
        assert_disjoint(held_by, data.near, same)
    assert_disjoint({f"{kind}/{pool}": held for kind in KINDS for pool, held in rows[kind].items()}, "exact")
    return Pools(rows, cut, alike, shipped)
