"""Which prompts count as one: those that differ in case, white space and plain punctuation only."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

# Punctuation that tells prompts apart wherever it stands, and marks that are punctuation though Unicode says symbol.
_MEANT, _QUOTES = set("#%&*/@\\\u2030()[]{}"), set("`\u00b4")
# Punctuation that does so in these places only.
_IN_PLACE = re.compile(
    r"""
    (?P<meant>
        (?<=\d)[.,:](?=\d)             # 3.5, 10:30
      | (?<!\w)\.(?=\w)               # .5, .NET
      | (?<![^\W\d_]{2})-(?=\s*\d)    # 12 - 3, -3, x-1; not covid-19
      | (?<=\d)! | !(?==)             # 5!, a != b
    ) | [^\w\s]
    """,
    re.VERBOSE,
)
_DASHES = dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2014\u2015\u2212"), "-")
# Soft hyphen, zero-width space, joiner of words and mark of the byte order, directions of text, forms of emoji.
_UNSEEN = dict.fromkeys((0xAD, 0x200B, 0x200E, 0x200F, 0x2060, 0xFEFF, 0xFE0E, 0xFE0F, *range(0x202A, 0x202F)))


def _folded(mark: re.Match[str]) -> str:
    character = mark.group()
    kind = unicodedata.category(character)
    if kind[0] == "M" or kind == "Cf":
        return character  # belongs to the letter or emoji before it: a vowel sign, a joiner
    plain = (kind[0] == "P" and character not in _MEANT) or kind == "Cc" or character in _QUOTES
    return " " if plain and mark["meant"] is None else f" {character} "


@lru_cache(maxsize=1 << 15)  # a run asks for the same prompts several times
def normalise(prompt: str) -> str:
    """Return a prompt's identity: composed (NFC), lower case, plain punctuation and white space folded.

    Marks that tell prompts apart stay: operators, currencies, emoji, brackets, the vowel signs of Indic scripts.
    """
    plain = unicodedata.normalize("NFC", prompt).lower().translate(_UNSEEN | _DASHES)
    return " ".join(_IN_PLACE.sub(_folded, plain).split()) or plain.strip()
