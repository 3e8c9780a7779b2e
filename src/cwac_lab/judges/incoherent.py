"""The rule for what is no answer at all; its identity is part of the version of every judge that uses it."""

from __future__ import annotations

import re
from collections import Counter

from cwac_lab.core.cache import digest
from cwac_lab.judges.reading import MIN_WORDS, plain, without_thoughts

# Raised when this file changes what the rule says.
RECIPE = 1
# A word so many times in a row (Booster's HS+), a sign of a script without spaces so many.
WORDS_IN_A_ROW, SIGNS_IN_A_ROW = 4, 8
# From so many words on a text may not consist of few different runs of three (signs: five).
LONG, DIFFERENT = 30, 0.3
# A text may not end in so many repeats of up to LOOP words, if that makes ENDING words or more.
REPEATS, LOOP, ENDING = 3, 12, 12
# Words of which no language is made: this many consonants in a row, or none but consonants, in this share of all.
CONSONANTS, BABBLE = 5, 0.5
# An echo says this share of its prompt's words and fewer than MIN_WORDS others, in their order.
ECHO = 0.6
RULE = digest(
    [
        RECIPE,
        MIN_WORDS,
        WORDS_IN_A_ROW,
        SIGNS_IN_A_ROW,
        LONG,
        DIFFERENT,
        REPEATS,
        LOOP,
        ENDING,
        CONSONANTS,
        BABBLE,
        ECHO,
    ]
)[:16]
# Scripts that are written without spaces: Thai, Lao, Tibetan, Burmese, Khmer, kana, Chinese signs.
UNSPACED = "\u0e00-\u0e7f\u0e80-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_SIGN = re.compile(f"[{UNSPACED}]")
_WORD = re.compile(f"[{UNSPACED}]|[^{UNSPACED}\\s]+")
_BABBLE = re.compile(f"[bcdfghjklmnpqrstvwxz]{{{CONSONANTS},}}|^[bcdfghjklmnpqrstvwxz]{{3,}}$")


def words_of(text: str) -> list[str]:
    """Return the words of a text; in scripts without spaces every sign is one."""
    return _WORD.findall(plain(text))


def is_echo(prompt: str, answer: str) -> bool:
    """Tell whether an answer says its prompt again, whole or most of it, and nothing else."""
    asked, said = words_of(prompt), words_of(without_thoughts(answer))
    if len(asked) < MIN_WORDS or len(said) < ECHO * len(asked):
        return False
    rest = " ".join(said)
    whole = " ".join(asked)
    if f" {rest} " in f" {whole} ":
        return True
    return len(rest.replace(whole, "").split()) < MIN_WORDS


def is_incoherent(answer: str) -> bool:
    """Tell whether an output is no answer at all.

    That is: fewer than ``MIN_WORDS`` words (a bare label is no answer to a request), thoughts only, one word again and
    again, little but symbols, a long text of a few phrases, an end that goes round in circles, or words without vowels.
    """
    text = without_thoughts(answer)
    words = words_of(text)
    if len(words) < MIN_WORDS:
        return True
    signs = sum(map(bool, map(_SIGN.match, words))) > len(words) / 2
    row = SIGNS_IN_A_ROW if signs else WORDS_IN_A_ROW
    if any(len(set(words[first : first + row])) == 1 for first in range(len(words) - row + 1)):
        return True
    if sum(len(word) for word in words) < 0.5 * len("".join(text.split())):
        return True
    return _few_phrases(words, 5 if signs else 3) or _ends_in_a_loop(words) or _is_babble(words)


def _few_phrases(words: list[str], length: int) -> bool:
    runs = Counter(zip(*(words[first:] for first in range(length)), strict=False))
    return len(words) >= LONG and len(runs) < DIFFERENT * (len(words) - length + 1)


def _ends_in_a_loop(words: list[str]) -> bool:
    for period in range(1, LOOP + 1):
        size = max(REPEATS * period, ENDING)
        if len(words) >= size and words[-size:-period] == words[-size + period :]:
            return True
    return False


def _is_babble(words: list[str]) -> bool:
    latin = [word for word in words if word.isascii() and word.isalpha() and len(word) > 2]
    return len(latin) >= MIN_WORDS and sum(map(bool, map(_BABBLE.search, latin))) > BABBLE * len(latin)
