"""AG News: topic of a news item (Zhang et al. 2015; instruction and rule of the DISL line of code)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cwac_lab.data.cells import label, text
from cwac_lab.data.embedded.news import news
from cwac_lab.data.tasks.base import Task, TaskRow, with_input

INSTRUCTION = (
    "Categorize the news article given in the input into one of the 4 categories:\n\n"
    "World\nSports\nBusiness\nSci/Tech\n"
)
LABELS = ("World", "Sports", "Business", "Sci/Tech")
_ANSWERS = {name.lower(): name for name in LABELS} | {"sci": "Sci/Tech"}


@dataclass
class AGNews(Task):
    """Exact match with a category, as written or in lower case (``sci`` counts for Sci/Tech)."""

    opening = with_input(INSTRUCTION, "")

    @staticmethod
    def embedded(n: int, seed: int) -> list[dict[str, Any]]:
        """Return generated news items."""
        return news(n, seed)

    def format(self, row: dict[str, Any], row_id: str) -> TaskRow:
        """Use the text as input and the category as response; labels may be names or the hub's numbers."""
        name = label(row, "label", LABELS)
        return TaskRow(row_id, with_input(INSTRUCTION, text(row, "text").strip()), name, name)

    def extract(self, output: str) -> str | None:
        """Return the category if the whole output is one, else None."""
        said = output.strip()
        return said if said in LABELS else _ANSWERS.get(said) if said == said.lower() else None
