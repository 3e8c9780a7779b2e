"""AG News: topic of a news item (Zhang et al. 2015; instruction and rule of the DISL line of code)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cwac_lab.data.embedded.news import news
from cwac_lab.data.tasks.base import Task, TaskRow, with_input

INSTRUCTION = (
    "Categorize the news article given in the input into one of the 4 categories:\n\n"
    "World\nSports\nBusiness\nSci/Tech\n"
)
LABELS = ("World", "Sports", "Business", "Sci/Tech")
_ANSWERS = {label.lower(): label for label in LABELS} | {"sci": "Sci/Tech"}


@dataclass
class AGNews(Task):
    """Exact match with a category, as written or in lower case (``sci`` counts for Sci/Tech)."""

    @staticmethod
    def embedded(n: int, seed: int) -> list[dict[str, Any]]:
        """Return generated news items."""
        return news(n, seed)

    def format(self, row: dict[str, Any], row_id: str) -> TaskRow:
        """Use the text as input and the category as response; labels may be names or the hub's numbers."""
        raw = row["label"]
        label = raw if raw in LABELS else LABELS[int(raw)]
        return TaskRow(row_id, with_input(INSTRUCTION, str(row["text"]).strip()), label, label)

    def extract(self, output: str) -> str | None:
        """Return the category if the whole output is one, else None."""
        text = output.strip()
        return text if text in LABELS else _ANSWERS.get(text) if text == text.lower() else None
