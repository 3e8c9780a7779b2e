"""Alpaca: open instructions (Taori et al. 2023), tested on those of AlpacaEval (Li et al. 2023).

Answers are open, and what counts is the share of them that a judge prefers to the reference answer (the win rate of
AlpacaEval). That judge is a large external model and no part of this package, so no answer is scored here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cwac_lab.data.cells import optional_text, text
from cwac_lab.data.embedded.exercises import exercises
from cwac_lab.data.tasks.base import Task, TaskRow, with_input


@dataclass
class Alpaca(Task):
    """Answers are saved and not judged: fine-tuning accuracy is n/a with n = 0, never 0."""

    held_out_loss = True
    # 28 rows of the published training data have no output (tatsu-lab/stanford_alpaca, issue 265).
    empty_on_hub = ("output",)

    @staticmethod
    def embedded(n: int, seed: int) -> list[dict[str, Any]]:
        """Return generated exercises that have a definite answer."""
        return exercises(n, seed)

    def format(self, row: dict[str, Any], row_id: str) -> TaskRow:
        """Use the instruction, with its input where there is one, as prompt and the output as response and gold."""
        instruction, output = text(row, "instruction").strip(), text(row, "output").strip()
        given = (optional_text(row, "input") or "").strip()  # AlpacaEval has no such column
        return TaskRow(row_id, with_input(instruction, given) if given else instruction, output, output)

    def extract(self, output: str) -> str | None:
        """Return the whole answer, or None where it is empty."""
        return output.strip() or None

    def correct(self, output: str, gold: str) -> bool | None:
        """Return None: an open answer is not judged here."""
        return None
