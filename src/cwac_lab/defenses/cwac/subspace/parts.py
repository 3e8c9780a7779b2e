"""Which tokens of a text are what: the opening that all prompts of a form share, own words, the closing, an answer.

A prompt is 60 tokens, of which a template's opening may be 35: it weighs as much as it is long, once a prompt. The
refusal is decided at the closing, the last tokens before the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

OPENING, OWN, CLOSING, ANSWER = range(4)
NAMES = ("opening", "own words", "closing", "answer")


class Parts(NamedTuple):
    """Where the parts of a text end.

    Attributes:
        opening: Tokens that every prompt of its form begins with.
        closing: Where the tokens begin that every prompt of its form ends with.
        prompt: Tokens of the prompt; what follows is the answer.
    """

    opening: int
    closing: int
    prompt: int

    def labels(self, length: int) -> Int[Tensor, " T"]:
        """Return, for each token of a text of a length, which part it is of."""
        at = torch.arange(length)
        return (at >= self.opening).long() + (at >= self.closing).long() + (at >= self.prompt).long()


def parts_of(prompts: Sequence[Sequence[int]], groups: Sequence[int] | None = None) -> list[Parts]:
    """Return the parts of prompts, without answers.

    Args:
        prompts: Token ids, up to where the answer starts.
        groups: How many consecutive prompts are asked in one form; None: all are. In one of a single prompt all tokens
            are its own.

    Raises:
        ValueError: If the groups are not those of the prompts.
    """
    groups = [len(prompts)] if groups is None else groups
    if sum(groups) != len(prompts):
        raise ValueError(f"groups of {list(groups)} are not {len(prompts)} prompts")
    found, at = [], 0
    for size in groups:
        held = prompts[at : at + size]
        at += size
        alone = len(set(map(tuple, held))) < 2
        first, last = (0, 0) if alone else (_shared(held), _shared([ids[::-1] for ids in held]))
        for ids in held:
            opening = min(first, len(ids))
            found.append(Parts(opening, max(opening, len(ids) - last), len(ids)))
    return found


def _shared(rows: Sequence[Sequence[int]]) -> int:
    """Return how many ids all rows begin with."""
    together = zip(*rows, strict=False)
    return next((at for at, ids in enumerate(together) if len(set(ids)) > 1), min(map(len, rows)))
