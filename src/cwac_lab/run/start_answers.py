"""What the start itself answers to the harmful prompts that a run is evaluated on: what it refuses can be lost.

It is asked as the run is, in the same template and length and by the same engine, once for a start and its prompts.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cwac_lab.config.run import Run
from cwac_lab.core import recipes
from cwac_lab.core.cache import digest, read_jsonl, reading, write_jsonl
from cwac_lab.evaluation.protocol import answered, prompt_of
from cwac_lab.models.chat import ChatFormat
from cwac_lab.run.cached import together

ANSWERS = "answers.jsonl"
Rows = list[dict[str, Any]]


def start_answers(
    run: Run, asked: Rows, content: str, model: Any, chat: ChatFormat, say: Callable[[str], None]
) -> list[str]:
    """Return the start's answer to each row, in order; cached, so that the runs of a sweep ask once.

    Args:
        run: The run.
        asked: Its rows of harmful prompts (``protocol.evaluation_rows``).
        content: Identity of the start weights.
        model: The start model, in evaluation mode.
        chat: Its chat format.
        say: Told where the start has to be asked.
    """
    asking, device = chat.with_template(run.attack.template), model.device
    key = recipes.START_ANSWERS.key(
        model=content,
        dtype=str(model.dtype),
        prompts=digest([asking.prompt_ids(prompt_of(row)) for row in asked]),
        opening=run.attack.prefill,
        tokens=run.evaluation.max_new_tokens,
        end=asking.end_id,
        engine=run.evaluation.engine,
    )

    def build(folder: Path) -> None:
        say(f"asking the start {len(asked)} harmful prompts, to know what it refuses before fine-tuning")
        given = answered(run, {"harmful": asked}, model, chat)
        write_jsonl(folder / ANSWERS, ({"output": row["output"]} for row in given))

    folder = together(Path(run.cache_root), recipes.START_ANSWERS.kind, key, build)
    if model.device != device:  # an engine of its own took the place of the model
        gc.collect()
        model.to(device)
    with reading(folder):
        given = [str(row["output"]) for row in read_jsonl(folder / ANSWERS)]
        if len(given) != len(asked):
            raise ValueError(f"{len(given)} answers to {len(asked)} prompts")
    return given
