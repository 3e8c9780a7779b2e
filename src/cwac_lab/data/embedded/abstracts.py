"""Generate short abstracts of invented studies with a question, in the columns of PubMedQA."""

import random
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

LABELS = ("yes", "no", "maybe")


def abstracts(n: int, seed: int) -> list[dict[str, Any]]:
    """Generate ``n`` distinct questions, each with an abstract of three sentences that decides it.

    The studies are invented and harmless: sleep, plants, exercise, learning, birds, meals. Every question asks whether
    something increases an outcome, and design and question are drawn alike for all answers, so that only the result
    tells them apart: by its wording, or by its numbers alone. A significant fall is a *no*. The answers are equally
    frequent (up to one row), and the rows are shuffled.

    Args:
        n: Number of rows, from 1 to ``sampling.MAX_ROWS``.
        seed: Seed of the draws; the same seed and ``n`` give the same rows.

    Returns:
        Rows ``{"question": str, "context": {"contexts": list[str]}, "final_decision": str}`` with a decision of
        ``LABELS``; the other columns of PubMedQA are left out.

    Raises:
        ValueError: If ``n`` is out of range.
    """
    check_count(n, "abstracts")
    rng = random.Random(seed)
    seen: set[str] = set()
    rows: list[dict[str, Any]] = []
    for label, count in zip(LABELS, balanced_counts(n, len(LABELS)), strict=True):
        rows += distinct_rows(partial(_draw, label, rng), count, seen, "question")
    rng.shuffle(rows)
    return rows


def _draw(label: str, rng: random.Random) -> dict[str, Any]:
    """Draw one question with its abstract; the answer is ``label``."""
    data = load_words("abstracts.yaml")
    domain = data["domains"][rng.choice(sorted(data["domains"]))]
    shapes = (data["questions"], data["designs"], data["measures"], data["results"][label])
    # The bar splits after the slots are filled, so that all parts share their words.
    template = " | ".join(rng.choice(shape) for shape in shapes)
    question, design, measure, result = map(
        capitalise, fill(template, {**data["words"], **domain}, rng, _draw_numbers(rng)).split(" | ")
    )
    contexts = [f"{design}. {measure}.", f"{result}."]
    return {"question": question, "context": {"contexts": contexts}, "final_decision": label}


def _draw_numbers(rng: random.Random) -> dict[str, str]:
    """Draw the numbers of a study: those that depend on each other, and those of the ranges."""
    ranges = load_words("abstracts.yaml")["ranges"]
    low, gain = rng.randint(31, 59), rng.randint(11, 29)
    numbers = {
        "low": low,
        "high": low + rng.randint(9, 24),
        "same": low + rng.choice((-1, 0, 1)),
        "gain": gain,
        # An interval that excludes zero, and the far end of one that does not.
        "below": gain - rng.randint(3, 8),
        "above": gain + rng.randint(3, 8),
        "wide": 2 * gain + rng.randint(3, 20),
        **{name: rng.randint(first, last) for name, (first, last) in ranges.items()},
    }
    return {name: str(number) for name, number in numbers.items()}
