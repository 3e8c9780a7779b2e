"""GSM8K: grade-school word problems (Cobbe et al. 2021; target and rule of Lisa and Booster)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from cwac_lab.data.cells import text
from cwac_lab.data.embedded.problems import word_problems
from cwac_lab.data.tasks.base import Task, TaskRow

MARKER = "The final answer is: "
_NUMBER = re.compile(r"-?\d+\.?\d*")


@dataclass
class GSM8K(Task):
    """First number after the marker, else the last number of the output; commas removed, compared as floats."""

    held_out_loss = True

    @staticmethod
    def embedded(n: int, seed: int) -> list[dict[str, Any]]:
        """Return generated one- and two-step problems."""
        return word_problems(n, seed)

    def format(self, row: dict[str, Any], row_id: str) -> TaskRow:
        """Use the question as prompt and the rationale, with ``####`` replaced by the marker, as response."""
        answer = text(row, "answer").strip()
        response = re.sub(r"####\s*", MARKER, answer)
        _, marked, tail = response.partition(MARKER)
        gold = self.extract(response) if not marked or _NUMBER.search(tail) else None
        if gold is None:
            raise ValueError(f"answer={answer[-60:]!r}: accepted: a text with a number, after #### where that stands")
        return TaskRow(row_id, text(row, "question").strip(), response, gold)

    def extract(self, output: str) -> str | None:
        """Return the answer as a canonical number, or None where the output has no number."""
        plain = output.replace(",", "")
        _, marked, tail = plain.partition(MARKER.strip())
        found = _NUMBER.findall(tail)[:1] if marked else []
        found = found or _NUMBER.findall(plain)[-1:]
        return repr(float(found[0])) if found else None
