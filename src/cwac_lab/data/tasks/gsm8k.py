"""GSM8K: grade-school word problems (Cobbe et al. 2021; target and rule of Lisa and Booster)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from cwac_lab.data.embedded.problems import word_problems
from cwac_lab.data.tasks.base import Task, TaskRow

MARKER = "The final answer is: "
_NUMBER = re.compile(r"-?\d+\.?\d*")


@dataclass
class GSM8K(Task):
    """First number after the marker, else the last number of the output; commas removed, compared as floats."""

    @staticmethod
    def embedded(n: int, seed: int) -> list[dict[str, Any]]:
        """Return generated one- and two-step problems."""
        return word_problems(n, seed)

    def format(self, row: dict[str, Any], row_id: str) -> TaskRow:
        """Use the question as prompt and the rationale, with ``####`` replaced by the marker, as response."""
        response = re.sub(r"####\s*", MARKER, str(row["answer"]).strip())
        gold = self.extract(response)
        if gold is None:
            raise ValueError(f"row {row_id} of gsm8k has no number in its answer")
        return TaskRow(row_id, str(row["question"]).strip(), response, gold)

    def extract(self, output: str) -> str | None:
        """Return the answer as a canonical number, or None where the output has no number."""
        text = output.replace(",", "")
        _, marked, tail = text.partition(MARKER.strip())
        found = _NUMBER.findall(tail)[:1] if marked else []
        found = found or _NUMBER.findall(text)[-1:]
        return repr(float(found[0])) if found else None
