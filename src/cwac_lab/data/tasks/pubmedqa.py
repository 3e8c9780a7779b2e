"""PubMedQA: biomedical yes/no/maybe questions about an abstract (Jin et al. 2019, arXiv 1909.06146).

The hub's rows to train on have generated labels (``pqa_artificial``, 211k rows, *yes* and *no* only), those to test on
are the thousand that experts labelled (``pqa_labeled``), about a tenth of them *maybe*. The paper of CWAC does not
print its instruction; the one here is our own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cwac_lab.data.cells import label, text
from cwac_lab.data.embedded.abstracts import LABELS, abstracts
from cwac_lab.data.tasks.base import Task, TaskRow, with_input

INSTRUCTION = "Answer the question about the abstract given in the input, and respond only yes, no or maybe"


@dataclass
class PubMedQA(Task):
    """Exact match of the stripped output with ``yes``, ``no`` or ``maybe`` (first letter in either case)."""

    opening = with_input(INSTRUCTION, "")

    @staticmethod
    def embedded(n: int, seed: int) -> list[dict[str, Any]]:
        """Return generated abstracts with a question each."""
        return abstracts(n, seed)

    def format(self, row: dict[str, Any], row_id: str) -> TaskRow:
        """Use abstract and question as input and the decision as response.

        The abstract is the hub's dict with a list ``contexts``, or one text. The question comes last, so that a
        conversation cut to ``trainer.max_length`` (from the left) loses the opening and never the question.
        """
        question, decision = text(row, "question").strip(), label(row, "final_decision", LABELS, numbered=False)
        given = f"{self._abstract(row)}\n\nQuestion: {question}"
        return TaskRow(row_id, with_input(INSTRUCTION, given), decision, decision)

    @staticmethod
    def _abstract(row: dict[str, Any]) -> str:
        context = row["context"]
        whole = "" if isinstance(context, dict) else text(row, "context").strip()
        parts = context.get("contexts") if isinstance(context, dict) else None
        # A mapping in quotes is what a table becomes where its cells are written as plain text.
        if whole.startswith("{") or not (whole or (parts and isinstance(parts, list))):
            raise ValueError(
                f"context={str(context)[:60]}: accepted: a text, or a mapping with a list contexts of texts"
            )
        return whole or " ".join(text({"contexts": part}, "contexts").strip() for part in parts or ())

    def extract(self, output: str) -> str | None:
        """Return the decision if the whole output is one, else None ("Yes." does not count)."""
        said = output.strip()
        answer = said[:1].lower() + said[1:]
        return answer if answer in LABELS else None
