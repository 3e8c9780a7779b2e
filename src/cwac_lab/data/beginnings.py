"""Words that many prompts begin with: an instruction, or what addresses a persona."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

# Fewer words are how a language begins its sentences. Where words are not spaced, a character counts as one.
WORDS = 3
# Of the prompts with which a beginning begins: while so many go on alike, the next word belongs to it.
_SAME = 0.8
# Thai, Lao, Khmer, Burmese, kana and Han.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"(?:[{_UNSPACED}]|[^\s{_UNSPACED}]+)\s*")


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
    split = [_WORD.findall(prompt) for prompt in prompts]
    found = _under(split, 0, 0, max(2, share * len(prompts)))
    return dict(sorted(found.items(), key=lambda each: -each[1]))


def _under(split: list[list[str]], depth: int, told: int, least: float) -> dict[str, int]:
    """Return the beginnings of prompts that share their first ``depth`` words, of which ``told`` are one already."""
    same, found = _SAME * len(split), {}
    while True:
        after = defaultdict(list)
        for words in split:
            if len(words) > depth + 1:  # a last word ends a prompt, so nothing would be asked after it
                after[words[depth]].append(words)
        frequent = [group for group in after.values() if len(group) >= least]
        if len(frequent) != 1 or len(frequent[0]) < same:
            break
        if depth - told >= WORDS and len(split) - len(frequent[0]) >= least:
            found["".join(split[0][:depth])], told = len(split), depth
        split, depth = frequent[0], depth + 1
    if depth - told >= WORDS:
        found["".join(split[0][:depth])], told = len(split), depth
    for group in frequent:
        found |= _under(group, depth + 1, told, least)
    return found
