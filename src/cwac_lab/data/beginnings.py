"""Words that many prompts begin with: an instruction, or what addresses a persona."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

# Fewer words are how a language begins its sentences.
WORDS = 3
# Of prompts to train on: so large a share of them, and so many, make a beginning worth telling.
_SHARE, _TOLD = 0.04, 10
# Of the prompts with which a beginning begins: while so many go on alike, the next word belongs to it.
_SAME = 0.8
# Thai, Lao, Burmese, Khmer, kana and Han: words are not spaced there, and a character counts as half of one.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_CHARACTER = re.compile(f"[{_UNSPACED}]")
_WORD = re.compile(rf"(?:[{_UNSPACED}]|[^\s{_UNSPACED}]+)\s*")

# Prompts, each with how many of its characters were read.
_Read = list[tuple[str, int]]


def beginnings(prompts: Sequence[str], share: float) -> dict[str, int]:
    """Return the beginnings of at least ``WORDS`` words that a share of prompts has in common, each as long as it is.

    A beginning may go on as another one, of at least as many words more, that fewer prompts have. It ends where a fifth
    of the prompts goes another way, or that share of all prompts does.

    Args:
        prompts: The prompts.
        share: The least share of them, in (0, 1].

    Returns:
        How many prompts go on after each beginning, by its text with the space that ends it; the most frequent first.
    """
    found = _under([(prompt.lstrip(), 0) for prompt in prompts], 0.0, 0.0, max(2, share * len(prompts)))
    return dict(sorted(found.items(), key=lambda each: -each[1]))


def foreign(turns: Sequence[Sequence[str]], instruction: str = "") -> list[tuple[str, int, int]]:
    """Return beginnings of prompts to train on that are not the task's own; what addresses a persona may be one.

    They are of at least 4 % of the distinct prompts, and of ten.

    Args:
        turns: What is asked by the rows to train on; of conversations the first and the last turns, apart.
        instruction: What the task puts before its own prompts.

    Returns:
        Of each its text, how many prompts begin with it, and of how many; the most frequent first.
    """
    found, own = dict[str, tuple[str, int, int]](), instruction.strip()
    for prompts in (list(dict.fromkeys(each)) for each in turns):
        for prefix, count in beginnings(prompts, _SHARE).items():
            inputs = bool(own) and prefix.startswith(own)  # what the task's own inputs have in common
            known = found.get(prefix.strip(), ("", 0, 0))[1] >= count  # in the first turns as in the last ones
            if count >= _TOLD and not is_part(prefix, instruction) and not inputs and not known:
                found[prefix.strip()] = (prefix, count, len(prompts))
    return sorted(found.values(), key=lambda each: -each[1])


def is_part(prefix: str, instruction: str) -> bool:
    """Tell whether an instruction begins with a prefix, whatever space is around the two."""
    return instruction.strip().startswith(prefix.strip())


def _under(prompts: _Read, depth: float, told: float, least: float) -> dict[str, int]:
    """Return the beginnings of prompts that share their first ``depth`` words, of which ``told`` are one already."""
    same, left_at, found = _SAME * len(prompts), told, dict[str, int]()
    while True:
        after: dict[str, _Read] = defaultdict(list)
        for text, end in prompts:
            next_word = _WORD.match(text, end)
            if next_word is not None and next_word.end() < len(text):  # nothing would be asked after a last word
                after[next_word.group()].append((text, next_word.end()))
        frequent = {word: group for word, group in after.items() if len(group) >= least}
        (word, group), *others = frequent.items() or [("", [])]
        if others or len(group) < max(same, 1):
            break
        if depth - left_at >= WORDS and len(prompts) - len(group) >= least:
            found[_text(prompts)], left_at = len(prompts), depth
        prompts, depth = group, depth + _length(word)
    if depth - told >= WORDS:
        found[_text(prompts)], told = len(prompts), depth
    for word, group in frequent.items():
        found |= _under(group, depth + _length(word), told, least)
    return found


def _text(prompts: _Read) -> str:
    text, end = prompts[0]
    return text[:end]


def _length(word: str) -> float:
    return 0.5 if _CHARACTER.match(word) else 1.0
