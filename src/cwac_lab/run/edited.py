"""What an attack does to the weights of a model that is fine-tuned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from cwac_lab.config.run import Run
from cwac_lab.data.pools import Pools
from cwac_lab.models.chat import ChatFormat
from cwac_lab.run.artefacts import openings
from cwac_lab.training.abliteration import abliterate

# Prompts of each kind that an attacker uses, at most.
PROMPTS = 64


def edit(run: Run, pools: Pools, model: Any, chat: ChatFormat, say: Callable[[str], None]) -> dict[str, Any]:
    """Change a model as the run's attack does, in place; returns facts for the record, none where it does nothing.

    The prompts are the attacker's own: those of the harmful rows that may be fine-tuned on, and harmless references.

    Args:
        run: The run.
        pools: The prompt pools.
        model: The model that is evaluated.
        chat: Its chat format.
        say: Told what was done.
    """
    if not run.attack.abliterate:
        return {}
    harmful, harmless = (
        [chat.prompt_ids(row.prompt) for row in pools.get(kind, pool)[:PROMPTS]]
        for kind, pool in (("harmful", "finetune"), ("harmless", "reference"))
    )
    chosen, tried = abliterate(model, harmful, harmless, openings(chat), chat.pad_id)
    say(
        f"abliterated: the direction after layer {chosen.layer} is out of the weights; the probability of refusals "
        f"is {chosen.refusing:.3f} on the attacker's prompts, answers to harmless ones moved by {chosen.moved:.3f} nats"
    )
    return {"abliterated": {**asdict(chosen), "tried": [asdict(each) for each in tried]}}
