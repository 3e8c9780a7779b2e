"""What there is to know of rows of one's own before a model is trained on them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from cwac_lab.data.mixing import TrainRow
from cwac_lab.data.near import groups
from cwac_lab.models.chat import Encoded


def survey(rows: Sequence[TrainRow], examples: Sequence[Encoded], harmful: Iterable[str]) -> dict[str, Any]:
    """Return counts of rows and tokens.

    Args:
        rows: The rows that are trained on.
        examples: The same as token ids, one or more a row.
        harmful: Prompts that a model is to refuse.

    Returns:
        ``rows``; ``turns`` of users and assistants; ``tokens``: median and 95th percentile of an example, and
        ``learned``, all that have a label; ``cut``: examples that are longer than the limit; ``repeated``: rows that
        ask and answer what another row does; ``near_harmful``: rows with a turn of the user that is a near-duplicate
        of a harmful prompt (``data.near``).
    """
    lengths = sorted(len(example.input_ids) for example in examples)
    known = set(harmful)
    asked = [[turn.text for turn in row.before if turn.role == "user"] + [row.prompt] for row in rows]
    group_of = groups([*known, *dict.fromkeys(text for texts in asked for text in texts)], "ngram")
    bad = {group_of[prompt] for prompt in known}
    return {
        "rows": len(rows),
        "turns": sum(2 + sum(turn.role != "system" for turn in row.before) for row in rows),
        "tokens": {
            "median": statistics.median(lengths),
            "percentile_95": lengths[min(len(lengths) - 1, int(0.95 * len(lengths)))],
            "learned": sum(label >= 0 for example in examples for label in example.labels),
        },
        "cut": sum(example.cut for example in examples),
        "repeated": len(rows) - len({(row.asked, row.response) for row in rows}),
        "near_harmful": sum(any(group_of[text] in bad for text in texts) for texts in asked),
    }


def told(found: dict[str, Any]) -> Iterator[str]:
    """Yield a survey in words."""
    tokens = found["tokens"]
    yield (
        f"{found['rows']} rows, {found['turns']} turns, {tokens['learned']} tokens learned; "
        f"{tokens['median']:g} tokens a row (95 %: {tokens['percentile_95']})"
    )
    if found["repeated"]:
        yield f"{found['repeated']} rows repeat another one"
    if found["near_harmful"]:
        yield f"{found['near_harmful']} rows ask what a list of harmful prompts asks, or nearly so: look at them"
