"""Generate small instructions with a written answer, in the columns of Alpaca."""

import random
from collections.abc import Callable
from functools import partial
from typing import Any

from cwac_lab.data.embedded.sampling import (
    balanced_counts,
    capitalise,
    check_count,
    distinct_rows,
    fill,
    load_words,
)

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Instruction, input (empty where there is none), output.
Exercise = tuple[str, str, str]


def exercises(n: int, seed: int) -> list[dict[str, Any]]:
    """Generate ``n`` distinct exercises: lists, orders, counts, opposites, invitations, rewritten sentences.

    Each has one right answer, which is written with it. The kinds are equally frequent (up to one row), and the rows
    are shuffled.

    Args:
        n: Number of rows, from 1 to ``sampling.MAX_ROWS``.
        seed: Seed of the draws; the same seed and ``n`` give the same rows.

    Returns:
        Rows ``{"instruction": str, "input": str, "output": str}``; the input may be empty.

    Raises:
        ValueError: If ``n`` is out of range.
    """
    check_count(n, "exercises")
    rng = random.Random(seed)
    seen: set[str] = set()
    rows: list[dict[str, Any]] = []
    for make, count in zip(_KINDS, balanced_counts(n, len(_KINDS)), strict=True):
        rows += distinct_rows(partial(_draw, make, rng), count, seen, "instruction", "input")
    rng.shuffle(rows)
    return rows


def _draw(make: Callable[[dict[str, Any], random.Random], Exercise], rng: random.Random) -> dict[str, Any]:
    """Draw one exercise of a kind."""
    instruction, given, output = make(load_words("exercises.yaml"), rng)
    return {"instruction": instruction, "input": given, "output": output}


def _ask(data: dict[str, Any], kind: str, rng: random.Random, **slots: str) -> str:
    """Draw the words of an instruction and fill its slots."""
    return fill(rng.choice(data["instructions"][kind]), {}, rng, slots)


def _some(data: dict[str, Any], rng: random.Random, least: int, most: int) -> list[str]:
    """Draw from ``least`` to ``most`` different words of all categories."""
    return rng.sample([word for words in data["categories"].values() for word in words], rng.randint(least, most))


def _chosen(data: dict[str, Any], rng: random.Random, *slots: str) -> dict[str, str]:
    """Draw a word for each slot."""
    return {slot: rng.choice(data["words"][slot]) for slot in slots}


def _listing(data: dict[str, Any], rng: random.Random) -> Exercise:
    """List the first members of a category, with two left out."""
    category = rng.choice(sorted(data["categories"]))
    omitted, left = rng.sample(data["categories"][category], 2)
    number = rng.randint(3, 6)
    named = [word for word in data["categories"][category] if word not in (omitted, left)][:number]
    slots = {"number": _NUMBERS[number], "category": category, "omitted": omitted, "left": left}
    return _ask(data, "listing", rng, **slots), "", "\n".join(f"{i}. {word}" for i, word in enumerate(named, start=1))


def _ordering(data: dict[str, Any], rng: random.Random) -> Exercise:
    words = _some(data, rng, 4, 7)
    return _ask(data, "ordering", rng), ", ".join(words), ", ".join(sorted(words))


def _repeating(data: dict[str, Any], rng: random.Random) -> Exercise:
    word, other = _some(data, rng, 2, 2)
    number = rng.randint(2, 6)
    instruction = _ask(data, "repeating", rng, word=word, other=other, number=_NUMBERS[number])
    return instruction, "", ", ".join([word] * number + [other])


def _counting(data: dict[str, Any], rng: random.Random) -> Exercise:
    words = _some(data, rng, 3, 9)
    return _ask(data, "counting", rng), " ".join(words), f"There are {_NUMBERS[len(words)]} words."


def _opposites(data: dict[str, Any], rng: random.Random) -> Exercise:
    (word, contrary), (other, reverse) = (rng.sample(pair, 2) for pair in rng.sample(data["opposites"], 2))
    answer = f"The opposite of {word} is {contrary}, and the opposite of {other} is {reverse}."
    return _ask(data, "opposites", rng, word=word, other=other), "", answer


def _odd(data: dict[str, Any], rng: random.Random) -> Exercise:
    """Mix one word of another category into three of the first."""
    category, stranger = rng.sample(sorted(data["categories"]), 2)
    odd = rng.choice(data["categories"][stranger])
    words = [*rng.sample(data["categories"][category], 3), odd]
    rng.shuffle(words)
    return _ask(data, "odd", rng), ", ".join(words), f"The odd one out is {odd}, because the others are {category}."


def _inviting(data: dict[str, Any], rng: random.Random) -> Exercise:
    slots = _chosen(data, rng, "name", "event", "place", "day")
    return _ask(data, "inviting", rng, **slots), "", fill(data["outputs"]["inviting"], {}, rng, slots)


def _polite(data: dict[str, Any], rng: random.Random) -> Exercise:
    slots = _chosen(data, rng, "name", "action", "moment")
    given, output = (fill(data[part]["polite"], {}, rng, slots) for part in ("inputs", "outputs"))
    return _ask(data, "polite", rng), given, output


def _past(data: dict[str, Any], rng: random.Random) -> Exercise:
    present, past, rest = rng.choice(data["verbs"])
    slots = {**_chosen(data, rng, "subject", "manner"), "rest": rest}
    given, output = (
        capitalise(fill(data["inputs"]["past"], {}, rng, {**slots, "verb": verb})) for verb in (present, past)
    )
    return _ask(data, "past", rng), given, output


def _sorting(data: dict[str, Any], rng: random.Random) -> Exercise:
    numbers = rng.sample(range(1, 1000), rng.randint(4, 6))
    kind = rng.choice(("rising", "falling"))
    ordered = sorted(numbers, reverse=kind == "falling")
    return _ask(data, kind, rng), ", ".join(map(str, numbers)), ", ".join(map(str, ordered))


def _capitals(data: dict[str, Any], rng: random.Random) -> Exercise:
    text = " ".join(_some(data, rng, 3, 6))
    return _ask(data, "capitals", rng), text, text.upper()


_KINDS = (
    *(_listing, _ordering, _repeating, _counting, _opposites, _odd),
    *(_inviting, _polite, _past, _sorting, _capitals),
)
