"""What a model thinks before it answers: blocks such as ``<think>...</think>``, which are no part of the answer."""

from __future__ import annotations

import re

_TAGS = [
    (f"{left}{name}{right}", f"{left}/{name}{right}")
    for left, right in ("<>", "[]")
    for name in ("think", "thinking", "thought", "thoughts", "reason", "reasoning", "seed:think")
]
# What opens and closes a block, as chat templates of the hub write it; upper and lower case are one.
PAIRS = (
    *_TAGS,
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
)


def _found(marker: str) -> re.Pattern[str]:
    return re.compile(re.escape(marker), re.IGNORECASE)


_PATTERNS = [(_found(opening), _found(closing), closing) for opening, closing in PAIRS]


def without_thoughts(text: str) -> tuple[str, bool]:
    """Return an answer without the blocks of thoughts that it begins with, and whether there were any.

    Of a block that does not end nothing is left: the limit of tokens came before an answer did.
    """
    begin = len(text) - len(text.lstrip())
    for opening, closing, _ in _PATTERNS:
        if opened := opening.match(text, begin):
            closed = closing.search(text, opened.end())
            return without_thoughts(text[closed.end() :])[0] if closed else "", True
    return text, False


def closing_of(text: str) -> str:
    """Return what closes the block of thoughts that a text leaves open, with line breaks as Qwen3 has them; or ""."""
    for opening, closing, words in _PATTERNS:
        opened = list(opening.finditer(text))
        if opened and not closing.search(text, opened[-1].end()):
            words = words.upper() if opened[-1].group().isupper() else words
            return ("\n" if text.endswith("\n") else "\n\n") + f"{words}\n\n"
    return ""
