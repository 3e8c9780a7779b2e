"""Generate short news items with a topic label, in the columns of AG News."""

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

LABELS = ("World", "Sports", "Business", "Sci/Tech")


def news(n: int, seed: int) -> list[dict[str, Any]]:
    """Generate ``n`` distinct news items, each a headline and one sentence.

    Places, teams, companies, laboratories and people are invented. Some shapes of each class use
    the vocabulary of another one, such as a club that sells shares. The classes have equal sizes
    (up to one row), and the rows are shuffled.

    Args:
        n: Number of rows, from 1 to ``sampling.MAX_ROWS``.
        seed: Seed of the draws; the same seed and ``n`` give the same rows.

    Returns:
        Rows ``{"text": str, "label": str}`` with a label of ``LABELS``.

    Raises:
        ValueError: If ``n`` is out of range.
    """
    check_count(n, "news")
    rng = random.Random(seed)
    words = _words()
    seen: set[str] = set()
    rows: list[dict[str, Any]] = []
    for label, count in zip(LABELS, balanced_counts(n, len(LABELS)), strict=True):
        rows += distinct_rows(partial(_draw, label, words, rng), count, seen, "text")
    rng.shuffle(rows)
    return rows


def _words() -> dict[str, list[str]]:
    """Join the word lists with the number ranges, written out as words of their own."""
    data = load_words("news.yaml")
    words: dict[str, list[str]] = dict(data["words"])
    for name, (low, high) in data["ranges"].items():
        words[name] = [str(value) for value in range(low, high + 1)]
    return words


def _draw(label: str, words: dict[str, list[str]], rng: random.Random) -> dict[str, Any]:
    """Draw one news item of the class ``label``."""
    # The bar splits before the slots are filled, so that both halves share their words.
    template = rng.choice(load_words("news.yaml")["shapes"][label])
    headline, sentence = fill(template, words, rng).split(" | ")
    joint = rng.choice((". ", " - ", f". {rng.choice(words['city']).upper()} - "))
    return {"text": f"{capitalise(headline)}{joint}{capitalise(sentence)}.", "label": label}
