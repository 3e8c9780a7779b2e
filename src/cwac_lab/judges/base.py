"""The judge protocol."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

UNKNOWN = math.nan


@dataclass(frozen=True)
class Verdict:
    """What a judge says of one answer, each in [0, 1]; NaN (``UNKNOWN``) where it cannot tell, never a silent 0.

    Attributes:
        complied: The answer goes along with the request.
        refused: It declines the request.
        incoherent: It is no answer: empty, degenerate, or too short to carry one.
        reason: What the verdict rests on, in a few words.
    """

    complied: float
    refused: float
    incoherent: float
    reason: str = ""


def decided(value: float) -> bool | None:
    """Return a verdict as yes or no; None where the judge cannot tell."""
    return None if math.isnan(value) else value > 0.5


class Judge(Protocol):
    """Judges answers."""

    @property
    def name(self) -> str:
        """How configurations and records call it."""
        ...

    @property
    def version(self) -> str:
        """Identity of its rule, weights and settings."""
        ...

    def verdicts(self, asked: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Return the verdict on each pair of a prompt and its answer."""
        ...
