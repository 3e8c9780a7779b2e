"""Generate short reviews with a sentiment label, in the columns of SST-2."""

import random
import re
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

NEGATIVE = 0
POSITIVE = 1

_SIDES = {NEGATIVE: "bad", POSITIVE: "good"}
# Words spelled with a vowel but spoken with a consonant.
_CONSONANT_SOUND = re.compile(r"(?:one|use|uni[^nm]|eu)", re.IGNORECASE)


def reviews(n: int, seed: int) -> list[dict[str, Any]]:
    """Generate ``n`` distinct reviews of films, books, restaurants, gadgets and plays.

    A sentence with both praise and blame is labelled by its main clause. Half of the rows (up to
    one) belong to each class, and the rows are shuffled.

    Args:
        n: Number of rows, from 1 to ``sampling.MAX_ROWS``.
        seed: Seed of the draws; the same seed and ``n`` give the same rows.

    Returns:
        Rows ``{"sentence": str, "label": int}`` with label 0 (negative) or 1 (positive).

    Raises:
        ValueError: If ``n`` is out of range.
    """
    check_count(n, "reviews")
    rng = random.Random(seed)
    seen: set[str] = set()
    rows: list[dict[str, Any]] = []
    for label, count in zip((NEGATIVE, POSITIVE), balanced_counts(n, 2), strict=True):
        rows += distinct_rows(partial(_draw, label, rng), count, seen, "sentence")
    rng.shuffle(rows)
    return rows


def _draw(label: int, rng: random.Random) -> dict[str, Any]:
    """Draw one review of the class ``label``."""
    data = load_words("reviews.yaml")
    domain = data["domains"][rng.choice(sorted(data["domains"]))]
    own, other = _SIDES[label], _SIDES[1 - label]
    template = rng.choice(data["shapes"]["either"] + data["shapes"][own])
    fixed, taken = _draw_parts(domain, rng)
    words = {
        "thing": domain["things"],
        "plural": [part for part in domain["parts_plural"] if part not in taken],
        "seen": domain["seen"],
        "rival": domain["rivals"],
        "never": domain["never"],
        "deed": domain[own]["deeds"],
        "quality": domain[own]["qualities"],
        "opposite": domain[other]["qualities"],
        "mark": data["marks"][own],
        "counter": data["marks"][other],
        "verdict": data["verdicts"][own] + domain[own]["verdicts"],
        "better": data["comparatives"][own],
        "best": data["superlatives"][own],
        "strong": data["intensifiers"],
        "period": data["periods"],
        "granted": data["concessions"],
        "people": data["people"],
    }
    text = _with_articles(fill(template, words, rng, fixed))
    return {"sentence": _styled(text, rng), "label": label}


def _draw_parts(domain: dict[str, Any], rng: random.Random) -> tuple[dict[str, str], list[str]]:
    """Draw two aspects of a domain, each with the verb that agrees with it."""
    taken = rng.sample(domain["parts_single"] + domain["parts_plural"], 2)
    fixed: dict[str, str] = {}
    for suffix, part in zip(("", "_2"), taken, strict=True):
        plural = part in domain["parts_plural"]
        fixed[f"part{suffix}"] = part
        fixed[f"is{suffix}"] = "are" if plural else "is"
        fixed[f"was{suffix}"] = "were" if plural else "was"
    return fixed, taken


def _with_articles(text: str) -> str:
    """Turn each ``a(n)`` into the article that the next word calls for."""

    def article(match: re.Match[str]) -> str:
        word = match.group(1)
        vowel = word[0].lower() in "aeiou" and not _CONSONANT_SOUND.match(word)
        return f"{'an' if vowel else 'a'} {word}"

    return re.sub(r"a\(n\) (\w+)", article, text)


def _styled(text: str, rng: random.Random) -> str:
    """Write a review as a lower-case fragment, with or without its full stop, or as a sentence."""
    style = rng.choice(("fragment", "stopped", "sentence"))
    if style == "sentence":
        return f"{capitalise(text)}."
    return text.lower() if style == "fragment" else f"{text.lower()}."
