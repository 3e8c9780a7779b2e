"""Draw distinct rows from templates and word lists, the same way for every embedded task."""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

Row = dict[str, Any]

# Every grammar holds far more rows than this; the cap keeps the rejection of repeats cheap and
# gives all tasks one documented limit.
MAX_ROWS = 20_000

_ATTEMPTS_PER_ROW = 50
_SLOT = re.compile(r"\{([a-z]+)(?:_(\d))?\}")


@cache
def load_words(name: str) -> dict[str, Any]:
    """Read a word-list resource that lies next to this module.

    Args:
        name: File name of the YAML resource, such as ``"reviews.yaml"``.

    Returns:
        The parsed mapping; it is cached and shared, so callers must not change it.
    """
    text = files("cwac_lab.data.embedded").joinpath(name).read_text(encoding="utf-8")
    words: dict[str, Any] = yaml.safe_load(text)
    return words


def check_count(n: int, task: str) -> None:
    """Refuse a row count that a task cannot serve.

    Args:
        n: Number of rows asked for.
        task: Name of the task, for the message.

    Raises:
        ValueError: If ``n`` is below 1 or above ``MAX_ROWS``.
    """
    if n < 1:
        raise ValueError(f"{task}: n must be at least 1, got {n}")
    if n > MAX_ROWS:
        raise ValueError(f"{task}: can give at most {MAX_ROWS} distinct rows, got n={n}")


def balanced_counts(n: int, groups: int) -> list[int]:
    """Split ``n`` over groups so that the sizes differ by at most one.

    Args:
        n: Number of rows to split.
        groups: Number of groups.

    Returns:
        One size per group; the later groups take the remainder.
    """
    return [(n + index) // groups for index in range(groups)]


def distinct_rows(make: Callable[[], Row], count: int, seen: set[str], *columns: str) -> list[Row]:
    """Draw rows until ``count`` of them differ in more than case and punctuation.

    Args:
        make: Draws one row.
        count: Number of rows to return.
        seen: Keys of the rows already taken; it is extended in place.
        columns: Columns whose text together must be unique.

    Returns:
        The distinct rows in the order in which they were drawn.

    Raises:
        ValueError: If the draws keep repeating, so that ``count`` is out of reach.
    """
    rows: list[Row] = []
    for _ in range(_ATTEMPTS_PER_ROW * count):
        if len(rows) == count:
            break
        row = make()
        key = " ".join(re.findall(r"\w+", " ".join(row[column] for column in columns).casefold()))
        if key not in seen:
            seen.add(key)
            rows.append(row)
    if len(rows) < count:
        raise ValueError(f"only {len(rows)} distinct rows found where {count} were asked for")
    return rows


def fill(
    template: str,
    words: Mapping[str, Sequence[str]],
    rng: random.Random,
    fixed: Mapping[str, str] | None = None,
) -> str:
    """Replace the slots of a template by words.

    ``{place}`` is the first draw from the list ``place`` and ``{place_2}`` a second, different
    one; a slot that occurs twice gets the same word.

    Args:
        template: Text with slots.
        words: Candidates for each slot name.
        rng: Source of the draws.
        fixed: Whole slots (``place_2`` included) that are already decided.

    Returns:
        The text without slots.
    """
    chosen = dict(fixed or {})
    needed: dict[str, int] = {}
    for name, index in _SLOT.findall(template):
        if (f"{name}_{index}" if index else name) not in chosen:
            needed[name] = max(needed.get(name, 1), int(index or 1))
    for name, size in needed.items():
        for position, word in enumerate(rng.sample(words[name], size), start=1):
            chosen[name if position == 1 else f"{name}_{position}"] = word
    return _SLOT.sub(lambda slot: chosen[slot.group(0)[1:-1]], template)


def capitalise(text: str) -> str:
    """Raise the first letter and leave the rest alone, unlike ``str.capitalize``.

    Args:
        text: Any text.

    Returns:
        The text with an upper-case first letter.
    """
    return text[:1].upper() + text[1:]
