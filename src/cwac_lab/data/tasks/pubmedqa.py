"""PubMedQA: biomedical yes/no/maybe questions about an abstract (Jin et al. 2019, arXiv 1909.06146).

The hub's rows to train on have generated labels (``pqa_artificial``, 211k rows, *yes* and *no* only), those to test on
are the thousand that experts labelled (``pqa_labeled``), about a tenth of them *maybe*. The paper of CWAC does not
print its instruction; the one here is our own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cwac_lab.data.embedded.abstracts import LABELS, abstracts
from cwac_lab.data.tasks.base import Task, TaskRow, with_input

INSTRUCTION = "Answer the question about the abstract given in the input, and respond only yes, no or maybe"


@dataclass
class PubMedQA(Task):
    """Exact match of the stripped output with ``yes``, ``no`` or ``maybe`` (first letter in either case)."""

    @staticmethod
    def embedded(n: int, seed: int) -> list[dict[str, Any]]:
        """Return generated abstracts with a question each."""
        return abstracts(n, seed)

    def format(self, row: dict[str, Any], row_id: str) -> TaskRow:
        """Use abstract and question as input and the decision as response.

        The abstract is the hub's dict with a list ``contexts``, or one text. The question comes last, so that a
        conversation cut to ``trainer.max_length`` (from the left) loses the opening and never the question.
        """
        context = row["context"]
        abstract = context if isinstance(context, str) else " ".join(str(part).strip() for part in context["contexts"])
        label = str(row["final_decision"]).strip().lower()
        if label not in LABELS:
            raise ValueError(f"row {row_id} of pubmedqa has final_decision={label}, not one of {', '.join(LABELS)}")
        text = f"{abstract.strip()}\n\nQuestion: {str(row['question']).strip()}"
        return TaskRow(row_id, with_input(INSTRUCTION, text), label, label)

    def extract(self, output: str) -> str | None:
        """Return the decision if the whole output is one, else None ("Yes." does not count)."""
        text = output.strip()
        answer = text[:1].lower() + text[1:]
        return answer if answer in LABELS else None
