"""Rows by source: generated with the package, local files with the hub's column names, or the hub itself."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from cwac_lab.core.errors import ConfigError, MissingAsset, one_of
from cwac_lab.data.cells import is_empty, meets, optional_text, prompt_text
from cwac_lab.data.folding import normalise as normalise
from cwac_lab.data.own_parts import part
from cwac_lab.data.placing import placed
from cwac_lab.data.reading import LONGEST, SUFFIXES, Row, find_file, kind_of, read_rows
from cwac_lab.data.tasks.base import HubSource, Task, TaskRow
from cwac_lab.data.tasks.base import TaskData as TaskData

EMBEDDED_LISTS = ("harmful_requests", "harmless_instructions", "harmless_lookalikes")
# Generated rows are a fixed corpus, as a public data set is: the seed of a run draws from it, never changes it.
CORPUS_SEED, EMBEDDED_TEST_ROWS, EMBEDDED_TRAIN_ROWS = 20260412, 600, 3000


@dataclass
class Prompts:
    """A list of prompts: an embedded resource, or a file under ``data.root`` or on the hub.

    Attributes:
        name: Name of the resource, file or data set. With its suffix it is that of a file, whatever ``data.source`` is.
        split: Split of a data set of the hub.
        subset: Configuration of a data set of the hub.
        revision: Commit, branch or tag of a data set of the hub; null: main.
        prompt_column: Column of the prompts.
        response_column: Column of affirmative openings, of which the first line is used.
        category_column: Column of categories.
        where: Rows that count: those whose columns hold these values.
    """

    name: str = ""
    split: str = "train"
    subset: str | None = None
    revision: str | None = None
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


# Longest reason of the hub that is shown, in characters.
_REASON = 200


def from_hub(hub: HubSource, split: str, key: str = "data=hub") -> list[Row]:
    """Return the rows of a data set of the hub; an error names the setting ``key``.

    Raises:
        MissingAsset: If it cannot be loaded.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        found = load_dataset(
            hub.path, hub.name, data_files=hub.data_files, split=hub.split or split, revision=hub.revision
        )
        place = f"{hub.data_files or hub.path} {split}"
        return [Row(dict(row), f"{place}, row {number}") for number, row in enumerate(found, 1)]
    except (DatasetsError, OSError, ValueError) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:_REASON]
        named = hub.data_files or hub.path
        accepted = "connect, or choose data=embedded or data=local" if key == "data=hub" else "a file or a folder here"
        raise MissingAsset(f"{key}: cannot load {named} from the hub ({why}); accepted: {accepted}") from error


@lru_cache
def embedded_prompts(name: str) -> tuple[PromptRow, ...]:
    """Return the prompts of a list that comes with the package, by its name under ``data/embedded``."""
    listed = resources.files("cwac_lab.data.embedded").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    rows = [(category, prompt) for category, prompts in yaml.safe_load(listed).items() for prompt in prompts]
    return tuple(PromptRow(f"{name}/{i}", prompt, None, category) for i, (category, prompt) in enumerate(rows))


def _chosen(rows: list[Row], spec: Prompts, key: str) -> list[tuple[int, Row]]:
    """Return the rows that meet the conditions of a list, with their numbers, if it has the columns it names.

    Raises:
        ConfigError: If it lacks a column, or no row meets a condition.
    """
    seen = list(dict.fromkeys(column for row in rows for column in row.cells))
    named = [(name, getattr(spec, name)) for name in ("prompt_column", "response_column", "category_column")]
    for name, column in [*named, *(("where", column) for column in spec.where)]:
        if column is not None and rows and column not in seen:
            raise ConfigError(f"{key}.{name}", column, f"a column of {spec.name}: {', '.join(seen)}")
    kept = list(enumerate(rows))
    for column, wanted in spec.where.items():
        met = [(i, row) for i, row in kept if meets(row.cells.get(column), wanted)]
        if kept and not met:
            held = ", ".join(list(dict.fromkeys(repr(row.cells.get(column))[:40] for _, row in kept))[:5])
            raise ConfigError(f"{key}.where.{column}", wanted, f"what {spec.name} has there, such as {held}")
        kept = met
    return kept


def load_prompts(
    source: str, spec: Prompts, root: Path | None, name: str | None = None, longest: int = LONGEST, key: str = ""
) -> list[PromptRow]:
    """Return the prompts of one list.

    Args:
        source: ``embedded``, ``local`` or ``hub``; an embedded resource is also found under the other two when its
            name starts with ``embedded:``.
        spec: The list.
        root: Folder of files; None: the current one.
        name: Name of the list in ``data.lists``, for errors.
        longest: Longest line of a file, in MiB.
        key: Setting that the list is, for errors; by default that of its name in ``data.lists``.

    Raises:
        MissingAsset: If the file or data set is not there.
        ConfigError: If it lacks a named column.
        LabError: If it cannot be read, or a cell is empty or no text; names file and line.
    """
    key, resource = key or f"data.lists.{name or spec.name}", spec.name.removeprefix("embedded:")
    file = bool(kind_of(Path(spec.name)))
    if resource != spec.name or (source == "embedded" and not file):
        if resource not in EMBEDDED_LISTS:
            accepted = f"{' | '.join(EMBEDDED_LISTS)}, or a file with its suffix ({', '.join(SUFFIXES)})"
            raise ConfigError(f"{key}.name", resource, accepted)
        if spec.where:
            raise ConfigError(f"{key}.where", spec.where, "nothing, for a list that comes with the package")
        return list(embedded_prompts(resource))
    if not spec.name:
        raise ConfigError(f"{key}.name", spec.name, "the name of a file under data.root, or of a data set of the hub")
    if source == "local" or file:
        rows = read_rows(find_file(root or Path(), spec.name), longest=longest)
    else:
        rows = from_hub(HubSource(spec.name, spec.subset, spec.revision), spec.split)

    def cell(row: Row, field: str, read: Callable[[dict[str, Any], str], str | None]) -> str | None:
        column = getattr(spec, field)
        with placed(row, f"{key}.{field}", column):
            return None if column is None else read(row.cells, column)

    return [
        PromptRow(
            f"{spec.name}/{i}",
            str(cell(row, "prompt_column", prompt_text)).strip(),
            cell(row, "response_column", optional_text),
            cell(row, "category_column", optional_text),
        )
        for i, row in _chosen(rows, spec, key)
    ]


@lru_cache(maxsize=8)
def _corpus(generate: Callable[[int, int], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return generate(EMBEDDED_TRAIN_ROWS + EMBEDDED_TEST_ROWS, CORPUS_SEED)


def load_task_rows(source: str, task: Task, split: str, root: Path | None, longest: int = LONGEST) -> list[TaskRow]:
    """Return all rows of a task's split (``train`` or ``test``) in file order.

    Raises:
        MissingAsset: If they are not there.
        ConfigError: If the task cannot read the columns.
        LabError: If a file cannot be read, or the task cannot read a row; names file and line.
    """
    named = {"train": task.train_split, "test": task.test_split}[split]
    if source == "embedded":
        made = _corpus(task.embedded)
        made = made[EMBEDDED_TEST_ROWS:] if split == "train" else made[:EMBEDDED_TEST_ROWS]
        rows = [Row(cells, f"embedded {task.name} {named}, row {number}") for number, cells in enumerate(made, 1)]
    elif source == "local":
        assert root is not None
        rows = read_rows(find_file(root, f"{task.name}/{named}"), longest=longest)
    else:
        rows = from_hub((task.hub_test if split == "test" else None) or task.hub, named)
    found = []
    for i, row in enumerate(rows):
        if source == "hub" and any(is_empty(row.cells.get(column)) for column in task.empty_on_hub):
            continue
        with placed(row, "task", task.name):
            found.append(task.format(row.cells, f"{task.name}/{named}/{i}"))
    return found


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
    own = task.own_rows("train", data.max_line, scored=data.n_validation > 0)
    if own is not None:
        sizes = {"n_validation": data.n_validation, "n_test": data.n_test, "seed": data.split_seed}
        return part(own, task.own_rows("test", data.max_line), taken, **sizes)
    root = Path(data.root) if data.root is not None else None
    seen: set[str] = set()

    def shuffled(split: str) -> list[TaskRow]:
        rows = load_task_rows(data.source, task, split, root, data.max_line)
        rows = [row for row in rows if normalise(row.prompt) not in taken]
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
        root: Folder of files; null: where Python stands (only lists that are named with their suffix).
        max_line: Longest line of a file of rows, in MiB.
        n_train: Rows of the fine-tuning set; null: as many as the task has.
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
    max_line: int = LONGEST
    n_train: int | None = 400
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
        for key, least in (("max_line", 1), ("n_train", 1), ("n_validation", 0), ("n_test", 1)):
            value = getattr(self, key)
            if value is not None and value < least:
                raise ConfigError(key, value, f"an integer >= {least}")
