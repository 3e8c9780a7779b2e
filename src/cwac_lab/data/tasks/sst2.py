"""SST-2: binary sentiment of review sentences (Socher et al. 2013; instruction and rule of Lisa, Booster, Vaccine)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cwac_lab.data.cells import label, text
from cwac_lab.data.embedded.reviews import reviews
from cwac_lab.data.tasks.base import Task, TaskRow, with_input

INSTRUCTION = "Analyze the sentiment of the input, and respond only positive or negative"
LABELS = ("negative", "positive")


@dataclass
class SST2(Task):
    """Exact match of the stripped output with ``positive`` or ``negative`` (first letter in either case)."""

    opening = with_input(INSTRUCTION, "")

    @staticmethod
    def embedded(n: int, seed: int) -> list[dict[str, Any]]:
        """Return generated review sentences."""
        return reviews(n, seed)

    def format(self, row: dict[str, Any], row_id: str) -> TaskRow:
        """Use the sentence as input and the label's word as response; labels may be words or the hub's numbers."""
        word = label(row, "label", LABELS)
        return TaskRow(row_id, with_input(INSTRUCTION, text(row, "sentence").strip()), word, word)

    def extract(self, output: str) -> str | None:
        """Return the label if the whole output is one, else None ("Positive." does not count)."""
        said = output.strip()
        answer = said[:1].lower() + said[1:]
        return answer if answer in LABELS else None
