"""Named suites of prompts, as others measure by them: each one file of the ``suite`` group, asked beside the pools.

No prompt of a suite is asked that is, or is near, what a run was trained on, held on or chosen on.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cwac_lab.core.cache import digest
from cwac_lab.core.errors import ConfigError, MissingAsset, in_range
from cwac_lab.data.folding import normalise
from cwac_lab.data.near import near_to
from cwac_lab.data.pools import KINDS, POOLS, Pools
from cwac_lab.data.sources import DataConfig, PromptRow, Prompts, TaskData, load_prompts

# Pools that a run, its start or a choice of its settings has seen.
SEEN = tuple(pool for pool in POOLS if pool != "test")


@dataclass
class Listed(Prompts):
    """Where the prompts of a suite are listed, in a file or on the hub.

    Attributes:
        kinds: By kind (``harmful``, ``harmless``, ``lookalike``), the rows that are of it: those whose columns hold
            these values; without any, all are harmful. To refuse is right of harmful prompts, and of no other kind.
    """

    kinds: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the kinds."""
        if not set(self.kinds) <= set(KINDS):
            raise ConfigError("kinds", list(self.kinds), " | ".join(KINDS))


@dataclass
class SuiteConfig:
    """A suite.

    Attributes:
        measures: What it measures, and who made it.
        licence: Licence of its prompts.
        local: Its file under ``data.root``; null: none.
        hub: The data set of the hub; null: none.
        judge: Who judges its answers; null: the first of ``evaluation.judges``.
        n: At most so many prompts of each kind, drawn from the list, the same ones in every run; null: all.
    """

    measures: str = ""
    licence: str = "unknown"
    local: Listed | None = None
    hub: Listed | None = None
    judge: str | None = None
    n: int | None = None

    def __post_init__(self) -> None:
        """Check the fields."""
        if self.n is not None:
            in_range("n", self.n, 1)

    def found(self, name: str, source: str) -> tuple[str, Listed]:
        """Return where its prompts are to be read: ``local`` or ``hub``, and the list.

        Raises:
            ConfigError: If a data source has none.
        """
        by_file = self.local if self.local is not None and Path(self.local.name).suffix else None
        listed = {"local": self.local, "hub": self.hub}.get(source) or by_file
        if listed is None:
            kinds = [f"data={kind}" for kind, each in (("local", self.local), ("hub", self.hub)) if each is not None]
            raise ConfigError("evaluation.suites", name, f"with data={source} no suite of this name; it is of {kinds}")
        return ("hub" if listed is self.hub else "local"), listed


@dataclass(frozen=True)
class Suite:
    """Prompts of a suite as they are asked.

    Attributes:
        rows: By kind; an id is that of the text.
        dropped: How many prompts were left out, since the run has seen them or near ones.
        judge: Who judges its answers; None: the first judge of the run.
    """

    rows: dict[str, list[PromptRow]]
    dropped: int
    judge: str | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """What a record tells of it: prompts by kind, how many were left out, and the hash of those that are asked."""
        texts = [row.prompt for kind in sorted(self.rows) for row in self.rows[kind]]
        prompts = {kind: len(rows) for kind, rows in self.rows.items()}
        return {"prompts": prompts, "dropped": self.dropped, "sha256": digest(texts)}


def load(name: str, suite: SuiteConfig, data: DataConfig) -> dict[str, list[PromptRow]]:
    """Return the prompts of a suite by kind, each once, in the order of its list.

    Raises:
        MissingAsset: If it is not there; the line says where it comes from.
        ConfigError: If its list lacks a column, or a kind no row.
        LabError: If a row cannot be read; names file and line.
    """
    source, listed = suite.found(name, data.source)
    root = Path(data.root) if data.root is not None else None
    rows: dict[str, list[PromptRow]] = {}
    seen: set[str] = set()
    for kind, where in (listed.kinds or {"harmful": {}}).items():
        spec = replace(listed, where={**listed.where, **where})
        try:
            given = load_prompts(source, spec, root, name, data.max_line, key=f"suites.{name}.{source}")
        except MissingAsset as error:
            raise MissingAsset(f"evaluation.suites={name}: {error}; {_origin(suite)}") from None
        kept = {normalise(row.prompt): row for row in reversed(given)}
        fresh = [row for text, row in reversed(kept.items()) if text not in seen]
        seen |= kept.keys()
        rows[kind] = [replace(row, id=f"{name}/{_short(row.prompt)}") for row in fresh]
    return rows


def _short(prompt: str) -> str:
    """Return an id of a text, by which the same prompt is one in runs that were given other lists."""
    return digest(normalise(prompt))[:12]


def _origin(suite: SuiteConfig) -> str:
    hub = f"{suite.hub.name} of the hub" if suite.hub is not None else "not on the hub as a list"
    return f"the suite is {hub}, licence {suite.licence} ({suite.measures})"


def apart(
    suites: Mapping[str, SuiteConfig], data: DataConfig, pools: Pools, task: TaskData, most: int | None = None,
    others: Sequence[str] = (),
) -> dict[str, Suite]:  # fmt: skip
    """Return the suites without prompts that a run has seen, or that are near to one.

    Args:
        suites: Suites by name.
        data: The data of the run; suites are held apart by its rule ``near``, at least by 5-grams.
        pools: Its prompts: all pools but the test pool count as seen.
        task: Its rows: those that are trained or chosen on count as seen.
        most: At most so many prompts of each kind of each suite.
        others: Further prompts that are trained on: those that an attack brings along.

    Raises:
        MissingAsset: If a suite is not there.
        ConfigError: If nothing is left of one, or of one of its kinds.
    """
    if not suites:
        return {}
    seen = [row.prompt for kind in KINDS for pool in SEEN for row in pools.get(kind, pool)]
    seen += others
    seen += [prompt for part in (task.train, task.validation) for row in part for prompt in row.prompts]
    loaded = {name: load(name, suite, data) for name, suite in suites.items()}
    every = [row.prompt for rows in loaded.values() for held in rows.values() for row in held]
    near = near_to(every, seen, "ngram" if data.near == "exact" else data.near)
    return {name: _kept(name, suites[name], rows, near, most) for name, rows in loaded.items()}


def _kept(
    name: str, suite: SuiteConfig, rows: dict[str, list[PromptRow]], near: Collection[str], most: int | None
) -> Suite:
    free = {kind: [row for row in held if row.prompt not in near] for kind, held in rows.items()}
    for kind in rows:
        if not free[kind]:
            held = f"a suite of which this run has not seen all {kind} prompts, or near ones"
            raise ConfigError("evaluation.suites", name, held)
    limit = min((n for n in (suite.n, most) if n is not None), default=None)
    dropped = sum(map(len, rows.values())) - sum(map(len, free.values()))
    if limit is not None:  # a draw of the list, which mostly stands by category: an id is a hash of the text
        free = {kind: sorted(held, key=lambda row: row.id)[:limit] for kind, held in free.items()}
    return Suite(free, dropped, suite.judge)
