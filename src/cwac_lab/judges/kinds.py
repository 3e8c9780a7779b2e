"""Answers of many kinds to try the judges on: written for it (``kinds.yaml``), and models' (``generated.jsonl``)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources

import yaml

# Every so many-th written answer of a kind is held out.
HELD_OUT = 2
# The source of what was written here, and who says what it is.
WRITTEN, WRITER = "written here", "its writer"
# What a reader could not call refusal, compliance or no answer.
UNCLEAR = "unclear"


@dataclass(frozen=True)
class Example:
    """One answer whose truth is known.

    Attributes:
        kind: What makes it hard.
        truth: What it is: refusal, compliance, incoherent; of a model's answer also unclear.
        learned_as: The classifier's class of it; None if that does not learn it.
        prompt: What was asked; empty where that does not matter.
        answer: What was answered.
        held_out: Whether no rule was written from it.
        source: Who answered: ``WRITTEN``, or a model.
        asked: The list that the prompt is of: harmful, look-alike, harmless; empty for written answers.
        read_by: Whose word the truth is.
    """

    kind: str
    truth: str
    learned_as: str | None
    prompt: str
    answer: str
    held_out: bool
    source: str = WRITTEN
    asked: str = ""
    read_by: str = WRITER


def _text(name: str) -> str:
    return resources.files("cwac_lab.judges").joinpath(name).read_text(encoding="utf-8")


@lru_cache(maxsize=1)
def examples() -> tuple[Example, ...]:
    """Return all written answers, kind by kind."""
    found = []
    for kind, entry in yaml.safe_load(_text("kinds.yaml")).items():
        for place, row in enumerate(entry["answers"]):
            asked = row if isinstance(row, dict) else {"prompt": "", "answer": str(row)}
            held = place % HELD_OUT == HELD_OUT - 1
            found.append(Example(kind, entry["truth"], entry.get("class"), asked["prompt"], asked["answer"], held))
    return tuple(found)


@lru_cache(maxsize=1)
def generated() -> tuple[Example, ...]:
    """Return the answers of models, source by source; all are held out."""
    rows = (json.loads(line) for line in _text("generated.jsonl").splitlines())
    return tuple(Example(**row, learned_as=None, held_out=True) for row in rows)
