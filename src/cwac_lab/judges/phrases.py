"""The phrases of ``phrases.yaml`` as one regular expression a group."""

from __future__ import annotations

import re
from functools import lru_cache
from importlib import resources
from typing import Any

import yaml

# What "~" stands for, and where a phrase begins and ends, in scripts with spaces between words and in those without.
_GAP, _UNSPACED_GAP = r"(?:\S+ ){0,6}?", r".{0,10}?"
_NAME = re.compile(r"\{(\w+)\}")
GROUPS = ("idiom", "decline", "part", "sorry", "moral", "law", "homily", "crisis", "premise", "lead", "other", "gives", "turn")


@lru_cache(maxsize=1)
def table() -> dict[str, Any]:
    """Return the file as it is: fillers, and by language its words, whether it has spaces, and its groups."""
    text = resources.files("cwac_lab.judges").joinpath("phrases.yaml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(text))


def _written_out(phrase: str, words: dict[str, str], *, spaced: bool) -> str:
    """Return a phrase as a regular expression."""
    while _NAME.search(phrase):
        phrase = _NAME.sub(lambda found: f"(?:{_tidy(words[found[1]])})", phrase)
    if not spaced:
        return phrase.replace(" ", "").replace("~", _UNSPACED_GAP)
    return " ".join(phrase.split()).replace("^", r"\^").replace("$", r"\$").replace("~ ", _GAP)


def _tidy(words: str) -> str:
    return re.sub(r"\s*\|\s*", "|", " ".join(words.split()))


@lru_cache(maxsize=1)
def groups() -> dict[str, re.Pattern[str]]:
    """Return the expression of every group, over all languages, for sentences as ``framed``."""
    found: dict[str, list[str]] = {name: [] for name in GROUPS}
    for language in table().values():
        if not isinstance(language, dict):
            continue
        spaced = language.get("spaces", True)
        for name in GROUPS:
            for phrase in language.get(name, ()):
                text = _written_out(str(phrase), language.get("words", {}), spaced=spaced)
                found[name].append(f" (?:{text})(?= )" if spaced else text)
    return {name: re.compile("|".join(phrases)) for name, phrases in found.items()}


@lru_cache(maxsize=1)
def _fillers() -> re.Pattern[str]:
    return re.compile(rf"(?<=[^\s^]) (?:{'|'.join(table()['fillers'].split())})(?= )")


def framed(sentence: str) -> str:
    """Return a sentence as phrases are looked for in it: between "^" and "$", without fillers and idioms."""
    return groups()["idiom"].sub(" ", _fillers().sub("", f" ^ {sentence} $ "))
