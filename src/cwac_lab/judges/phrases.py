"""The phrases of ``phrases.yaml`` as one regular expression a language and group."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from importlib import resources
from typing import Any

import yaml

# What "~" stands for, in scripts with spaces between words and in those without.
_GAP, _UNSPACED_GAP = r"(?:\S+ ){0,6}?", r".{0,10}?"
_NAME = re.compile(r"\{(\w+)\}")
GROUPS = (
    "decline", "part", "short", "sorry", "no", "idiom", "moral", "law", "homily", "crisis", "premise", "back", "lead",
    "other", "gives", "letter", "turn",
)  # fmt: skip
# The groups that are looked for where idioms are taken out.
WITHOUT_IDIOMS = ("decline", "part", "short", "sorry", "no")
Signals = dict[str, str]


@lru_cache(maxsize=1)
def table() -> dict[str, Any]:
    """Return the file as it is: fillers, and by language what it is known by, its words, and its groups."""
    text = resources.files("cwac_lab.judges").joinpath("phrases.yaml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(unicodedata.normalize("NFKC", text)))


def _tidy(words: str) -> str:
    return re.sub(r"\|\s+", "|", words.strip())


def _written_out(phrase: str, words: dict[str, str], *, spaced: bool) -> str:
    """Return a phrase as a regular expression."""
    while _NAME.search(phrase):
        phrase = _NAME.sub(lambda found: f"(?:{_tidy(words[found[1]])})", phrase)
    phrase = re.sub(r"\\?([$^])", r"\\\1", phrase)
    if not spaced:
        return phrase.replace(" ", "").replace("~", _UNSPACED_GAP)
    return f" (?:{' '.join(phrase.split()).replace('~ ', _GAP)})(?= )"


@lru_cache(maxsize=1)
def languages() -> dict[str, dict[str, re.Pattern[str]]]:
    """Return, by language, the expression of every group that it has."""
    found = {}
    for language, entry in table()["languages"].items():
        spaced, words = entry.get("spaces", True), entry.get("words", {})
        found[language] = {
            name: re.compile("|".join(_written_out(str(phrase), words, spaced=spaced) for phrase in entry[name]))
            for name in GROUPS
            if name in entry
        }
    return found


@lru_cache(maxsize=1)
def _fillers() -> re.Pattern[str]:
    return re.compile(rf"(?<=[^\s^]) (?:{'|'.join(table()['fillers'].split())})(?= )")


@lru_cache(maxsize=1)
def _known_by() -> tuple[dict[str, frozenset[str]], dict[str, re.Pattern[str]]]:
    """Return what a language is known by: words of its own, or letters of its own."""
    entries = table()["languages"].items()
    words = {name: frozenset(entry["common"].split()) for name, entry in entries if "common" in entry}
    return words, {name: re.compile(f"[{entry['letters']}]") for name, entry in entries if "letters" in entry}


def _spoken(text: str) -> list[str]:
    """Return the languages that a text may be in: English always, and those of which it has words or letters."""
    words, letters = _known_by()
    said = set(text.split())
    found = ["english", *(name for name, common in words.items() if not said.isdisjoint(common))]
    return found if text.isascii() else found + [name for name, letter in letters.items() if letter.search(text)]


def signals(sentences: Sequence[str]) -> list[Signals]:
    """Return, for each sentence in ``plain`` form, the groups that it has a phrase of, with the phrase."""
    searched = [languages()[name] for name in _spoken(" ".join(sentences))]
    return [_signals(sentence, searched) for sentence in sentences]


def _signals(sentence: str, searched: Sequence[dict[str, re.Pattern[str]]]) -> Signals:
    framed = _fillers().sub("", f" ^ {sentence} $ ")
    bare = framed
    for language in searched:
        if "idiom" in language:
            bare = language["idiom"].sub(" ", bare)
    found: Signals = {}
    for language in searched:
        for name, expression in language.items():
            if name not in found and (match := expression.search(bare if name in WITHOUT_IDIOMS else framed)):
                found[name] = " ".join(match.group().strip(" ^$").split())
    return found
