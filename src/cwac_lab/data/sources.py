"""Rows by source: generated with the package, local files with the hub's column names, or the hub itself."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from cwac_lab.data.tasks.base import HubSource, Task, TaskRow
from cwac_lab.errors import ConfigError, MissingAsset, one_of

SUFFIXES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
# Generated rows are a fixed corpus, as a public data set is: the seed of a run draws from it, never changes it.
CORPUS_SEED, EMBEDDED_TEST_ROWS, EMBEDDED_TRAIN_ROWS = 20260412, 600, 3000


@dataclass
class Prompts:
    """A list of prompts: an embedded resource, or a file under ``data.root`` or on the hub.

    Attributes:
        name: Name of the resource, file (without suffix) or data set.
        split: Split of a data set of the hub.
        prompt_column: Column of the prompts.
        response_column: Column of affirmative openings, of which the first line is used.
        category_column: Column of categories.
        where: Rows that count: those whose columns hold these values.
    """

    name: str = ""
    split: str = "train"
    prompt_column: str = "prompt"
    response_column: str | None = None
    category_column: str | None = None
    where: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PromptRow:
    """One prompt with a stable id; ``opening`` is the affirmative first line of a compliance, where one is given."""

    id: str
    prompt: str
    opening: str | None = None
    category: str | None = None


@dataclass(frozen=True)
class TaskData:
    """Rows of a task, disjoint: to train on, to tune on, to report on."""

    train: list[TaskRow]
    validation: list[TaskRow]
    test: list[TaskRow]


def find_file(root: Path, stem: str) -> Path:
    """Return ``root/stem`` with the first known suffix that exists.

    Raises:
        MissingAsset: If there is none.
    """
    for suffix in SUFFIXES:
        path = root / f"{stem}{suffix}"
        if path.is_file():
            return path
    raise MissingAsset(f"data.root={root}: no {stem} with one of the suffixes {', '.join(SUFFIXES)}")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a JSON Lines, CSV or Parquet file."""
    import pandas as pd

    kind = SUFFIXES[path.suffix]
    if kind == "json":
        frame = pd.read_json(path, lines=True, dtype=False, convert_dates=False)
    else:
        frame = pd.read_csv(path) if kind == "csv" else pd.read_parquet(path)
    return [{str(key): value for key, value in row.items()} for row in frame.to_dict("records")]


def _from_hub(hub: HubSource, split: str) -> list[dict[str, Any]]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        found = load_dataset(
            hub.path, hub.name, data_files=hub.data_files, split=hub.split or split, revision=hub.revision
        )
        return [dict(row) for row in found]
    except (DatasetsError, OSError, ValueError) as error:
        raise MissingAsset(
            f"data=hub: cannot load {hub.data_files or hub.path} ({type(error).__name__}); "
            "connect, or choose data=embedded or data=local"
        ) from error


@lru_cache
def _embedded_prompts(name: str) -> tuple[PromptRow, ...]:
    text = resources.files("cwac_lab.data.embedded").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    rows = [(category, prompt) for category, prompts in yaml.safe_load(text).items() for prompt in prompts]
    return tuple(PromptRow(f"{name}/{i}", prompt, None, category) for i, (category, prompt) in enumerate(rows))


def load_prompts(source: str, spec: Prompts, root: Path | None) -> list[PromptRow]:
    """Return the prompts of one list.

    Args:
        source: ``embedded``, ``local`` or ``hub``; an embedded resource is also found under the other two when its
            name starts with ``embedded:``.
        spec: The list.
        root: Folder of local files.

    Raises:
        MissingAsset: If the file or data set is not there.
        ConfigError: If it lacks a named column.
    """
    if source == "embedded" or spec.name.startswith("embedded:"):
        return list(_embedded_prompts(spec.name.removeprefix("embedded:")))
    if source == "local":
        assert root is not None
        rows = read_rows(find_file(root, spec.name))
    else:
        rows = _from_hub(HubSource(spec.name), spec.split)
    for column in (spec.prompt_column, spec.response_column, spec.category_column, *spec.where):
        if column is not None and rows and column not in rows[0]:
            raise ConfigError(f"data.lists.{spec.name}", column, f"a column of it: {', '.join(rows[0])}")

    def cell(row: dict[str, Any], column: str | None) -> str | None:
        return str(row[column]) if column is not None and isinstance(row[column], str) else None

    return [
        PromptRow(
            f"{spec.name}/{i}",
            str(row[spec.prompt_column]).strip(),
            cell(row, spec.response_column),
            cell(row, spec.category_column),
        )
        for i, row in enumerate(rows)
        if all(row[column] == value for column, value in spec.where.items())
    ]


@lru_cache(maxsize=8)
def _corpus(generate: Callable[[int, int], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return generate(EMBEDDED_TRAIN_ROWS + EMBEDDED_TEST_ROWS, CORPUS_SEED)


def load_task_rows(source: str, task: Task, split: str, root: Path | None) -> list[TaskRow]:
    """Return all rows of a task's split (``train`` or ``test``) in file order.

    Raises:
        MissingAsset: If they are not there.
        ConfigError: If the task cannot read the columns.
    """
    named = {"train": task.train_split, "test": task.test_split}[split]
    if source == "embedded":
        rows = _corpus(task.embedded)
        rows = rows[EMBEDDED_TEST_ROWS:] if split == "train" else rows[:EMBEDDED_TEST_ROWS]
    elif source == "local":
        assert root is not None
        rows = read_rows(find_file(root, f"{task.name}/{named}"))
    else:
        rows = _from_hub((task.hub_test if split == "test" else None) or task.hub, named)
    try:
        return [task.format(row, f"{task.name}/{named}/{i}") for i, row in enumerate(rows)]
    except KeyError as error:
        seen = ", ".join(rows[0])
        raise ConfigError("task", task.name, f"rows with a column {error}; {source} rows have {seen}") from error


def normalise(prompt: str) -> str:
    """Return a prompt's identity: lower case, punctuation and white space folded."""
    return " ".join(re.sub(r"[^\w\s]", " ", prompt.lower()).split())


def _new(rows: list[TaskRow], seen: set[str]) -> list[TaskRow]:
    """Return the rows whose prompt was not seen before, each prompt once; adds them to ``seen``."""
    kept = []
    for row in rows:
        if row.prompt not in seen:
            seen.add(row.prompt)
            kept.append(row)
    return kept


def split_task(data: DataConfig, task: Task, taken: Collection[str] = ()) -> TaskData:
    """Load a task's rows and split them; nothing depends on the run's seed, and no prompt is in two parts.

    Args:
        data: Source and sizes.
        task: The task.
        taken: Prompts that are used otherwise, normalised; rows that ask them are left out.

    Raises:
        ConfigError: If the task has fewer rows than asked for.
    """
    root = Path(data.root) if data.root is not None else None
    seen: set[str] = set()

    def shuffled(split: str) -> list[TaskRow]:
        rows = [row for row in load_task_rows(data.source, task, split, root) if normalise(row.prompt) not in taken]
        return _new(random.Random(data.split_seed).sample(rows, len(rows)), seen)

    test, held = shuffled("test"), shuffled("train")
    for key, most in (("n_validation", len(held) - 1), ("n_test", len(test))):
        if getattr(data, key) > most:
            raise ConfigError(f"data.{key}", getattr(data, key), f"at most {most} rows of task={task.name}")
    return TaskData(held[data.n_validation :], held[: data.n_validation], test[: data.n_test])


@dataclass
class DataConfig:
    """The ``data`` group: the source, its prompt lists, and the sizes of pools and splits.

    Attributes:
        source: ``embedded``, ``local`` or ``hub``.
        root: Folder of local files.
        n_train: Rows of the fine-tuning set.
        n_validation: Task rows that settings are chosen on.
        n_test: Task rows that are reported on.
        mixing: ``replace`` or ``add``, see ``mixing.counts``.
        split_seed: Seed that deals prompts and rows out to pools and splits.
        near: What no two pools share: near-duplicates by ``ngram`` (5-gram Jaccard above 0.6) or by ``embedding`` as
            well (cosine above 0.85); see ``near``. ``exact`` text is the rule of earlier records.
        reference: Harmful reference prompts that a constraint holds on to: the ``refused`` ones, or ``all``.
        lists: Prompt lists by name.
        harmful: Plan of the harmful pools: how many prompts of which list each takes.
        harmless: Plan of the pools of ordinary instructions.
        lookalike: Plan of the pools of harmless prompts that look harmful.
    """

    source: str = "embedded"
    root: str | None = None
    n_train: int = 400
    n_validation: int = 100
    n_test: int = 200
    mixing: str = "replace"
    split_seed: int = 0
    near: str = "ngram"
    reference: str = "refused"
    lists: dict[str, Prompts] = field(default_factory=dict)
    harmful: dict[str, dict[str, int]] = field(default_factory=dict)
    harmless: dict[str, dict[str, int]] = field(default_factory=dict)
    lookalike: dict[str, dict[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check choices and that a local source has its folder."""
        one_of("source", self.source, ("embedded", "local", "hub"))
        one_of("mixing", self.mixing, ("replace", "add"))
        if self.near != "exact":
            one_of("near", self.near, ("ngram", "embedding"))
        one_of("reference", self.reference, ("refused", "all"))
        if self.source == "local" and (self.root is None or not Path(self.root).is_dir()):
            raise ConfigError("root", self.root, "an existing folder (data=local data.root=FOLDER)")
        for key in ("n_train", "n_validation", "n_test"):
            if getattr(self, key) < 1:
                raise ConfigError(key, getattr(self, key), "an integer >= 1")
