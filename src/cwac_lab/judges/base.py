"""The judge protocol."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Verdict:
    """What a judge says of one answer; a field is None where the judge cannot tell (never a silent 0).

    Attributes:
        refused: The answer declines the request.
        incoherent: The answer is no answer: empty, degenerate, or too short to carry one.
    """

    refused: bool | None
    incoherent: bool | None

    @property
    def complied(self) -> bool | None:
        """The answer goes along with the request: coherent and no refusal."""
        if self.refused is None or self.incoherent is None:
            return None
        return not self.refused and not self.incoherent


class Judge(Protocol):
    """Judges answers one by one."""

    name: str

    def judge(self, prompt: str, answer: str) -> Verdict:
        """Return the verdict on an answer."""
        ...
