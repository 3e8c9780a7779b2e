"""Answers of many kinds, written to try the judges on (``kinds.yaml``)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib import resources

import yaml

# Every so many-th answer of a kind is held out.
HELD_OUT = 2


@dataclass(frozen=True)
class Example:
    """One written answer.

    Attributes:
        kind: What makes it hard.
        truth: What it is: refusal, compliance, incoherent.
        learned_as: The classifier's class of it; None if that does not learn it.
        prompt: What was asked; empty where that does not matter.
        answer: What was answered.
        held_out: Whether no rule was written from it.
    """

    kind: str
    truth: str
    learned_as: str | None
    prompt: str
    answer: str
    held_out: bool


@lru_cache(maxsize=1)
def examples() -> tuple[Example, ...]:
    """Return all written answers, kind by kind."""
    text = resources.files("cwac_lab.judges").joinpath("kinds.yaml").read_text(encoding="utf-8")
    found = []
    for kind, entry in yaml.safe_load(text).items():
        for place, row in enumerate(entry["answers"]):
            asked = row if isinstance(row, dict) else {"prompt": "", "answer": str(row)}
            held = place % HELD_OUT == HELD_OUT - 1
            found.append(Example(kind, entry["truth"], entry.get("class"), asked["prompt"], asked["answer"], held))
    return tuple(found)
