"""Generate short arithmetic word problems with a worked answer, in the columns of GSM8K."""

import operator
import random
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from cwac_lab.data.embedded.sampling import check_count, distinct_rows, load_words

MAX_RESULT = 200

_OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}
_SLOT = re.compile(r"\{(\w+)(?: (\w+))?\}")


def word_problems(n: int, seed: int) -> list[dict[str, Any]]:
    """Generate ``n`` distinct word problems, one half with one step and one half with two.

    All quantities are whole numbers from 0 to ``MAX_RESULT`` and divisions leave no remainder. An
    odd ``n`` has one two-step problem more. The rows are shuffled.

    Args:
        n: Number of rows, from 1 to ``sampling.MAX_ROWS``.
        seed: Seed of the draws; the same seed and ``n`` give the same rows.

    Returns:
        Rows ``{"question": str, "answer": str}``; the answer is one line per step, which contains
        the calculation such as ``3 + 4 = 7``, and a last line ``#### N``.

    Raises:
        ValueError: If ``n`` is out of range.
    """
    check_count(n, "word_problems")
    rng = random.Random(seed)
    seen: set[str] = set()
    shapes = load_words("problems.yaml")["shapes"]
    rows = distinct_rows(partial(_draw, shapes["one_step"], rng), n // 2, seen, "question")
    rows += distinct_rows(partial(_draw, shapes["two_step"], rng), n - n // 2, seen, "question")
    rng.shuffle(rows)
    return rows


def _draw(shapes: list[dict[str, Any]], rng: random.Random) -> dict[str, Any]:
    """Draw one problem from the given scenario shapes."""
    shape = rng.choice(shapes)
    numbers = _draw_numbers(shape, rng)
    nouns = _draw_nouns(shape, rng)
    lines = [_render(line, numbers, nouns) for line in shape["work"]]
    final = numbers[f"r{len(shape['steps'])}"].split()[-1]
    return {
        "question": _render(shape["text"], numbers, nouns),
        "answer": "\n".join([*lines, f"#### {final}"]),
    }


def _draw_numbers(shape: Mapping[str, Any], rng: random.Random) -> dict[str, str]:
    """Draw the numbers of a shape until every step has an allowed result.

    Returns the drawn numbers, each result as ``r1`` or ``r2`` and its equation as ``e1`` or ``e2``.
    """
    while True:
        drawn = {name: rng.randint(low, high) for name, (low, high) in shape["numbers"].items()}
        solved = _solve(shape["steps"], drawn)
        if solved is not None:
            return solved


def _solve(steps: list[str], drawn: Mapping[str, int]) -> dict[str, str] | None:
    """Carry out the steps; return ``None`` where a result is out of bounds or not whole."""
    values = dict(drawn)
    equations: dict[str, str] = {}
    for index, step in enumerate(steps, start=1):
        left, symbol, right = step.split()
        a, b = (values[part] if part in values else int(part) for part in (left, right))
        if symbol == "/" and a % b:
            return None
        result = _OPERATIONS[symbol](a, b)
        # A story that goes on with nothing left ("shares the other 0 apples") reads oddly.
        if not (0 if index == len(steps) else 1) <= result <= MAX_RESULT:
            return None
        values[f"r{index}"] = result
        equations[f"e{index}"] = f"{a} {symbol} {b} = {result}"
    return {**{name: str(value) for name, value in values.items()}, **equations}


def _draw_nouns(shape: Mapping[str, Any], rng: random.Random) -> dict[str, str]:
    """Draw two people with the pronouns of the first, and the objects that the shape asks for."""
    data = load_words("problems.yaml")
    first, second = rng.sample([*data["people"]["she"], *data["people"]["he"]], 2)
    they, their = ("she", "her") if first in data["people"]["she"] else ("he", "his")
    nouns = {"name": first, "other": second, "they": they, "They": they.capitalize(), "their": their}
    for slot, theme in shape.get("things", {}).items():
        nouns[slot] = rng.choice([word for word in data["things"][theme] if word not in nouns.values()])
    return nouns


def _render(text: str, numbers: Mapping[str, str], nouns: Mapping[str, str]) -> str:
    """Fill the slots of a problem.

    ``{a}`` is a number or a word, ``{a item}`` a number with its noun in agreement, ``{one item}``
    the bare singular and ``{all item}`` the bare plural. A noun that is no slot stands for itself.
    """

    def replace(slot: re.Match[str]) -> str:
        head, noun = slot.groups()
        if noun is None:
            return numbers.get(head) or nouns[head]
        noun = nouns.get(noun, noun)
        if head in ("one", "all"):
            return noun if head == "one" else _plural(noun)
        return f"{numbers[head]} {noun if numbers[head].split()[-1] == '1' else _plural(noun)}"

    return _SLOT.sub(replace, text)


def _plural(noun: str) -> str:
    """Give the plural of a noun of the word list."""
    irregular: dict[str, str] = load_words("problems.yaml")["plurals"]
    return irregular.get(noun, f"{noun}s")
