"""What a judge reads of an answer: without thoughts, code, marks and quoted speech, sentence by sentence."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

_THOUGHT = re.compile(r"<(think|thinking|thought|reasoning|reflection)>.*?(?:</\1>|\Z)", re.DOTALL | re.IGNORECASE)
_THOUGHT_END = re.compile(r"\A.*</(?:think|thinking|thought|reasoning|reflection)>", re.DOTALL | re.IGNORECASE)
_CODE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_LIST = re.compile(r"^\s*(?:\d{1,2}[.)]|[-*\u2022])\s", re.MULTILINE)
# Ends of sentences in several scripts; a number before a full stop is that of an item.
_END = re.compile(r"(?:(?<!\d)\.(?!\w)|[!?;\n\u2026\u3002\uff01\uff1f\uff1b\u0964\u061f\u06d4\u2014]|:(?=\s))+")
# Speech between quotation marks of several languages; within single ones an apostrophe has a letter on both sides.
_QUOTES = re.compile(
    '"[^"\n]{1,800}"|\u201c[^\u201d\n]{1,800}\u201d|\u201e[^\u201c\u201d\n]{1,800}[\u201c\u201d]'
    "|\u00ab[^\u00bb\n]{1,800}\u00bb|\u300c[^\u300d\n]{1,800}\u300d|\u2018[^\u2018\n]{1,800}\u2019(?!\\w)"
    "|(?<!\\w)'(?=\\w)(?:[^'\n]|(?<=\\w)'(?=\\w)){1,800}'(?!\\w)"
)
_APOSTROPHES = "'\u2019\u2018\u02bc\u00b4`"
_VERBS = ("do", "does", "did", "would", "should", "could", "is", "are", "was", "were", "has", "have", "must", "need")
_ENDINGS = {"'m": "am", "'re": "are", "'s": "is", "'ll": "will", "'d": "would", "'ve": "have"}
_SUBJECTS = ("i", "we", "you", "they", "he", "she", "it", "that", "this", "there", "here", "what", "who")
# Short forms, written out; those of "not", and "I'm", without an apostrophe too.
_SHORT = (
    {"can't": "cannot", "cant": "cannot", "won't": "will not", "wont": "will not", "im": "i am", "let's": "let us"}
    | {f"{verb}{end}": f"{verb} not" for verb in _VERBS for end in ("n't", "nt")}
    | {f"{subject}{end}": f"{subject} {verb}" for subject in _SUBJECTS for end, verb in _ENDINGS.items()}
)
MIN_WORDS = 3


class _Marks(dict[int, "str | None"]):
    """Maps punctuation and symbols to a space and invisible characters to nothing; filled as it is asked."""

    def __missing__(self, code: int) -> str | None:
        category = unicodedata.category(chr(code))
        self[code] = " " if category[0] in "PSZ" else None if category == "Cf" else chr(code)
        return self[code]


# A dot above is what lower case leaves of the Turkish capital I.
_MARKS = _Marks(dict.fromkeys(map(ord, _APOSTROPHES), "'") | {0x307: None})


def without_thoughts(answer: str) -> str:
    """Return what comes after the model's thoughts; nothing where they never end, or are all there is."""
    return _THOUGHT.sub(" ", _THOUGHT_END.sub("", answer)) if "<" in answer else answer


def plain(text: str) -> str:
    """Return a text in lower case with short forms written out, and with spaces for punctuation, one between words."""
    words = [word.strip("'") for word in text.lower().translate(_MARKS).split()]
    return " ".join([_SHORT.get(word, word) for word in words]).replace("can not", "cannot")


@dataclass(frozen=True)
class Reading:
    """An answer as a judge reads it.

    Attributes:
        text: It, after the thoughts.
        sentences: Its sentences in ``plain`` form, without quoted speech where more than that was said, without code.
        items: How many items of lists it has.
        code: Whether it has a block of code.
    """

    text: str
    sentences: list[str]
    items: int
    code: bool


def _unless_a_word(quote: re.Match[str]) -> str:
    """Return a quote of one or two words as it is: those are the speaker's own."""
    return quote.group() if len(quote.group().split()) < MIN_WORDS else " "


def read(answer: str) -> Reading:
    """Return an answer as a judge reads it."""
    text = unicodedata.normalize("NFKC", without_thoughts(answer)).strip()
    prose = _CODE.sub("\n", text) if "```" in text else text
    outside = _QUOTES.sub(_unless_a_word, prose)
    if len(outside) < len(prose) and len(plain(outside).split()) >= MIN_WORDS:
        prose = outside
    sentences = [sentence for part in _END.split(prose) if (sentence := plain(part))]
    return Reading(text, sentences, len(_LIST.findall(text)), "```" in text)
