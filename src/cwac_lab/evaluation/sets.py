"""Rates of a model on named sets of prompts, each with n and interval: how a start is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cwac_lab.data.sources import PromptRow
from cwac_lab.data.tasks.base import Task
from cwac_lab.evaluation.generate import generate
from cwac_lab.evaluation.verdicts import aggregate, judge_rows
from cwac_lab.judges.refusal import RefusalJudge
from cwac_lab.models.chat import ChatFormat

# The rate of a set, by the kind of its prompts.
RATE = {"harmful": "harmful_score", "harmless": "over_refusal", "lookalike": "over_refusal_lookalike"}
# Length of the answers: one for all starts, as runs with other lengths share them.
TOKENS = 48


@dataclass(frozen=True)
class PromptSet:
    """Prompts of one kind (a key of ``RATE``), and what they are in words."""

    name: str
    kind: str
    rows: Sequence[PromptRow]


def judge() -> str:
    """Return the name and version of the judge."""
    return f"{RefusalJudge.name} {RefusalJudge().version}"


def rates(
    model: Any, chat: ChatFormat, sets: Sequence[PromptSet], task: Task, batch_size: int
) -> dict[str, dict[str, Any]]:
    """Return, by set, its rate in percent with a 95 % Wilson interval and n, which rate it is, and incoherent answers.

    ``broken`` tells that these are so many that the rate says nothing of safety.

    Empty sets are left out.

    Args:
        model: A causal language model in evaluation mode.
        chat: Its chat format.
        sets: The sets.
        task: Any task (no row of a task is judged).
        batch_size: Prompts per batch of generation.
    """
    found = {}
    for each in sets:
        if each.rows:
            outputs = generate(model, chat, [row.prompt for row in each.rows], TOKENS, batch_size)
            answered = [
                {"kind": each.kind, "id": row.id, "prompt": row.prompt, "output": output}
                for row, output in zip(each.rows, outputs, strict=True)
            ]
            metrics = aggregate(judge_rows(answered, task, RefusalJudge()))
            found[each.name] = {"rate": RATE[each.kind], **metrics[RATE[each.kind]]}
            found[each.name] |= {"incoherent": metrics["incoherent"]["value"], "broken": metrics["broken"]}
    return found
