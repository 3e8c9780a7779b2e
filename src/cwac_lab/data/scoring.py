"""Scores of answers against a gold one, by name: what counts as right in a task of one's own."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from cwac_lab.core.classes import accepted, located
from cwac_lab.core.errors import ConfigError

_NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?")
# A letter that is marked as a choice: "answer is B", "(B)", "B)", "B." or "B:" at the beginning, or alone.
_CHOICES = [
    re.compile(pattern)
    for pattern in (
        r"^\W*([A-J])\W*$", r"(?i:answer|choice|option)\W+(?:(?i:is|would be)\W+)?([A-J])(?![A-Za-z])",
        r"\(([A-J])\)", r"^\W*([A-J])[).:,]", r"(?<![A-Za-z])([B-HJ])(?![A-Za-z'])",
    )
]  # fmt: skip


class Score(Protocol):
    """Tells whether an answer is right."""

    def correct(self, output: str, gold: str) -> bool | None:
        """Tell whether an output answers as the gold does; None where that cannot be told."""
        ...


def _words(text: str) -> str:
    return " ".join(text.casefold().split())


@dataclass(frozen=True)
class Exact:
    """The same words, whatever their case and white space."""

    def correct(self, output: str, gold: str) -> bool:
        """Compare the whole texts."""
        return _words(output) == _words(gold)


@dataclass(frozen=True)
class Contains:
    """The gold answer stands in the output as whole words."""

    def correct(self, output: str, gold: str) -> bool:
        """Look for the gold answer."""
        return re.search(rf"(?<!\w){re.escape(_words(gold))}(?!\w)", _words(output)) is not None


@dataclass(frozen=True)
class Number:
    """The last number of the output is that of the gold answer."""

    def correct(self, output: str, gold: str) -> bool | None:
        """Compare as numbers: 1,000 is 1000.0; None where the gold answer has none."""
        said, wanted = (_NUMBER.findall(text.replace("\u2212", "-")) for text in (output, gold))
        if not wanted:
            return None
        return bool(said) and float(said[-1].replace(",", "")) == float(wanted[-1].replace(",", ""))


@dataclass(frozen=True)
class Choice:
    """The letter A to J that is marked as the choice is that of the gold answer; I and A may be words."""

    def correct(self, output: str, gold: str) -> bool | None:
        """Compare the letters; None where the gold answer has none."""
        said, wanted = (_chosen(text) for text in (output, gold))
        return None if wanted is None else said == wanted


@dataclass(frozen=True)
class Regex:
    """What a pattern finds in the output (its first group, or all of it) is what it finds in the gold answer.

    Where it finds nothing in the gold answer, that whole answer is what has to be found.
    """

    pattern: str = ""

    def __post_init__(self) -> None:
        """Check the pattern."""
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ConfigError("pattern", self.pattern, f"a regular expression ({error})") from None
        if not self.pattern:
            raise ConfigError("pattern", self.pattern, "a regular expression, with metric=regex")

    def correct(self, output: str, gold: str) -> bool:
        """Compare what is found."""
        said, wanted = (
            None if (match := re.search(self.pattern, text)) is None else _found(match) for text in (output, gold)
        )
        return said is not None and _words(said) == _words(gold if wanted is None else wanted)


def _chosen(text: str) -> str | None:
    """Return the letter of a choice by the plainest form that there is; None where there is none."""
    return next((found[1] for pattern in _CHOICES if (found := pattern.search(text.strip()))), None)


def _found(match: re.Match[str]) -> str | None:
    return match[1] if match.re.groups else match[0]


SCORES: dict[str, Callable[[], Score]] = {"exact": Exact, "contains": Contains, "number": Number, "choice": Choice}


def made(name: str, pattern: str | None) -> Score:
    """Return the score of a name, or of the path of a class.

    Raises:
        ConfigError: If there is none, or ``regex`` has no pattern.
    """
    if name == "regex":
        return Regex(pattern or "")
    if name in SCORES:
        return SCORES[name]()
    if "." not in name:
        raise ConfigError("metric", name, f"{' | '.join(SCORES)} | regex, or {accepted('Score')}")
    found = located("metric", name, "Score")()
    if not hasattr(found, "correct"):
        raise ConfigError("metric", name, "a class with correct(output, gold)")
    scored: Score = found
    return scored
