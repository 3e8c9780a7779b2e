"""General ability beside the task, in a run: plain text before and after, and the tasks of lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cwac_lab.config.run import Run
from cwac_lab.core import distributed, recipes
from cwac_lab.core.cache import digest, read_jsonl, reading, write_jsonl
from cwac_lab.core.errors import LabError
from cwac_lab.data import plain_text
from cwac_lab.evaluation import harness, plain
from cwac_lab.evaluation.heldout import Loss
from cwac_lab.models.chat import ChatFormat
from cwac_lab.models.loading import load_model
from cwac_lab.results import store
from cwac_lab.results.store import RunFolder
from cwac_lab.run.cached import together
from cwac_lab.run.edited import edit
from cwac_lab.run.start import Start

Say = Callable[[str], None]
LOSSES = "losses.jsonl"


def start_losses(run: Run, content: str, model: Any, chat: ChatFormat, say: Say) -> list[Loss]:
    """Return the start's loss on each document of plain text; cached, so that the runs of a sweep measure once.

    Args:
        run: The run.
        content: Identity of the start weights.
        model: The start model, in evaluation mode.
        chat: Its chat format.
        say: Told where the start has to be measured.
    """
    texts = plain_text.documents(run.evaluation.plain_text)
    ids = digest([plain.encoded(chat, text).input_ids for text in texts])
    key = recipes.START_TEXT.key(model=content, dtype=str(model.dtype), texts=ids)

    def build(folder: Path) -> None:
        say(f"measuring the start on {len(texts)} documents of plain text")
        found = plain.losses(model, chat, texts, run.evaluation.batch_size)
        write_jsonl(folder / LOSSES, ({"loss": list(loss)} for loss in found))

    folder = together(Path(run.cache_root), recipes.START_TEXT.kind, key, build)
    with reading(folder):
        found = [(float(row["loss"][0]), int(row["loss"][1])) for row in read_jsonl(folder / LOSSES)]
        if len(found) != len(texts):
            raise ValueError(f"{len(found)} losses on {len(texts)} documents")
    return found


def on_plain_text(run: Run, model: Any, chat: ChatFormat, begun: list[Loss] | None) -> dict[str, Any]:
    """Return what a record has of a model on plain text: nothing where that is not asked for.

    Args:
        run: The run.
        model: Its model in the end.
        chat: Its chat format.
        begun: What ``start_losses`` gave, where the model is not the start.
    """
    if not run.evaluation.perplexity:
        return {}
    texts = plain_text.documents(run.evaluation.plain_text)
    return plain.told(plain.losses(model, chat, texts, run.evaluation.batch_size), begun, texts)


def of_harness(run: Run, model: Any, chat: ChatFormat, say: Say) -> dict[str, Any]:
    """Return what a record has of the harness's tasks; nothing where they fail, which is told."""
    say(f"asking lm_eval's {', '.join(run.evaluation.lm_eval)}")
    try:
        return {"lm_eval": harness.measured(run.evaluation, model, chat)}
    except LabError as error:
        say(str(error))
        return {}


def check_made(run: Run, folder: RunFolder) -> None:
    """Check that a run that has just been recorded has all tasks of the harness that it was asked for.

    Raises:
        LabError: If they failed.
    """
    if folder.writes and run.evaluation.lm_eval and harness.lacks(run.evaluation, folder.read(store.METRICS)):
        again = "and the same command asks the saved model again"
        raise LabError(f"{folder.path} is recorded without {_tasks(run)}, which failed as told above; {again}")


def _tasks(run: Run) -> str:
    return f"{harness.KEY}=[{','.join(run.evaluation.lm_eval)}]"


def catch_up(run: Run, folder: RunFolder, begin: Start, say: Say) -> list[str]:
    """Measure the saved model of a finished run for what its record has not; returns what cannot be made.

    Args:
        run: What is asked for.
        folder: The finished run; its ``metrics.json`` is written again.
        begin: Its start.
        say: Told what is made.

    Raises:
        LabError: If the harness fails; what was measured before that is kept.
    """
    record, asked = folder.read(store.METRICS), run.evaluation
    texts = plain_text.documents(asked.plain_text) if asked.perplexity else []
    reads = bool(texts) and record.get("plain_text") != plain_text.content(texts)
    tasks = harness.lacks(asked, record)
    named = ["perplexity of that text (evaluation.perplexity=true)"] * reads
    named += [f"results of all these tasks ({_tasks(run)})"] * tasks
    if not named or (run.finetune and not folder.has(store.MODEL)):
        return named
    if distributed.world() > 1:
        return [f"{each}, which one process makes afterwards" for each in named]
    say(f"measuring the {'saved model' if run.finetune else 'start'}: {' and '.join(named)}")
    model, chat = begin.load(run)
    begun = start_losses(run, begin.folder.content, model, chat, say) if run.finetune and reads else None
    if run.finetune:
        del model  # one of the two is in memory at a time
        model = load_model(folder.path / store.MODEL, run.dtype, run.trainer.device)
        edit(run, begin.pools, model, chat, say)
    if reads:
        record |= on_plain_text(run, model, chat, begun)
        folder.write(store.METRICS, record)
    if tasks:
        folder.write(store.METRICS, record | {"lm_eval": harness.measured(asked, model, chat, record.get("lm_eval"))})
    return []
