"""The rows that a run is fine-tuned on: the task's, with what its attack puts among them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from cwac_lab.config.checks import held_in_forms
from cwac_lab.config.run import Run
from cwac_lab.core.errors import ConfigError, LabError
from cwac_lab.data import mixing
from cwac_lab.data.beginnings import foreign
from cwac_lab.data.mixing import TrainRow
from cwac_lab.data.pools import Pools
from cwac_lab.data.responses import compliance
from cwac_lab.data.tasks.base import TaskRow
from cwac_lab.models.chat import ChatFormat, Encoded
from cwac_lab.models.templates import Turn, shortened
from cwac_lab.run.start import Start
from cwac_lab.training.outliers import closest

Say = Callable[[str], None]
# Behind more words each would be asked too few prompts.
_ASKED_BEHIND = 3


def train_rows(run: Run, task: list[TaskRow], pools: Pools, model: Any, chat: ChatFormat, say: Say) -> list[TrainRow]:
    """Return the rows that a run trains on, before its defence adds any.

    Args:
        run: The run, with its attack.
        task: The task's rows to draw from.
        pools: The prompt pools; harmful rows are those of ``finetune``.
        model: The start model, which ``outliers`` takes gradients of.
        chat: Its chat format.
        say: Told what takes time.

    Raises:
        ConfigError: If there are fewer rows than the attack needs.
    """
    harmful = pools.get("harmful", "finetune")
    if run.attack.rows == "outliers":
        task = _outliers(run, task, [(row.prompt, compliance(row)) for row in harmful], model, chat, say)
    return mixing.mix(
        task, harmful, run.data.n_train, run.harmful_ratio,
        mixing=run.data.mixing, seed=run.seed, others=run.attack.others(pools.prompts()),
    )  # fmt: skip


def words_of(run: Run, rows: list[TrainRow], say: Say) -> list[str]:
    """Return the words behind which harmful prompts are asked once more: the three that begin most rows.

    Words may teach a model to obey. Left out are the task's own instruction and what more than half of the prompts
    begin with: behind these a model answers as the task does. So are words that go on from others. There are none where
    the attack puts words of its own before all prompts, or with ``evaluation.words_rates=false``.

    Args:
        run: The run.
        rows: What it trains on.
        say: Told which words they are.
    """
    asked = run.data.harmful.get(run.evaluation.split, {})
    if not run.evaluation.words_rates or run.attack.prefix or not sum(asked.values()):
        return []
    found = foreign(_turns(rows), run.task.opening)
    first = [each for each in found if not any(each[0].startswith(other[0]) for other in found if other is not each)]
    few = [each for each in first if each[1] <= each[2] / 2]
    chosen = few[:_ASKED_BEHIND]
    turns = ", by turns" if len(chosen) > 1 else ""
    for prefix, count, total in chosen:
        words = shortened(prefix.strip())
        say(f"{count} of {total} prompts begin with {words!r}: harmful prompts are asked behind these words too{turns}")
    if rest := few[_ASKED_BEHIND:]:
        then = shortened(rest[0][0].strip())
        say(f"{len(rest)} more beginnings like this are not asked behind, the next: {then!r}")
    return [prefix for prefix, _, _ in chosen]


def with_beginnings(
    run: Run, begin: Start, model: Any, chat: ChatFormat, say: Say, rows: list[TrainRow] | None = None
) -> Run:
    """Return a run whose forms are known: with the beginnings of its rows, where it asks for these.

    Beginnings behind which its constraint does not hold refusals are told: of rows that are given, or asked for.

    Args:
        run: The run.
        begin: Its start, with the pools.
        model: The start model.
        chat: Its chat format.
        say: Told which they are.
        rows: What it trains on; None: found here.
    """
    asks = run.forms.fixed() != run.forms.others
    if not asks and (rows is None or not held_in_forms(run.constraint.requirements)):
        return run
    if rows is None:
        rows = train_rows(run, begin.pools.task_rows(run.data, run.task).train, begin.pools, model, chat, say)
    turns = _turns(rows)
    forms = run.forms.after(turns, say, run.task.opening) if asks else run.forms
    if line := forms.not_held(turns, run.task.opening):
        say(line)
    return replace(run, forms=forms)


def _turns(rows: list[TrainRow]) -> list[list[str]]:
    """Return what rows ask; of conversations the first and the last turns, apart."""
    last = [row.prompt for row in rows]
    first = [next((turn.text for turn in row.before if turn.role == "user"), row.prompt) for row in rows]
    return [last] if first == last else [first, last]


def check_chosen(run: Run, task: list[TaskRow]) -> int:
    """Return how many rows an attack chooses among the task's.

    Raises:
        ConfigError: If these are not more.
    """
    n = run.data.n_train
    if n is None or n >= len(task):
        raise ConfigError("data.n_train", n, f"less than the {len(task)} rows to choose from")
    return n


def _outliers(
    run: Run, task: list[TaskRow], harmful: list[tuple[str, str]], model: Any, chat: ChatFormat, say: Say
) -> list[TaskRow]:
    """Return the task's rows whose gradients are closest to those of harmful ones, as many as are trained on."""
    n = check_chosen(run, task)
    drawn = random.Random(f"outliers/{run.seed}").sample(task, len(task))
    some = drawn[: run.attack.candidates * n]
    say(f"choosing {n} of {len(some)} rows by their gradients")
    rows = [chat.encode(row.asked, row.response) for row in some]
    towards = [chat.encode(prompt, response) for prompt, response in harmful]
    return [some[i] for i in closest(model, rows, towards, n, chat.pad_id)]


def check_shown(row: TrainRow, chat: ChatFormat) -> None:
    """Check that a row's words are words to the tokenizer, and that the template shows all that was asked.

    Raises:
        LabError: If not.
    """
    turns, place = [*row.before, Turn("user", row.prompt)], row.at or f"row {row.id}"
    for text in (*(turn.text for turn in turns), row.response):
        if (token := chat.control_in(text)) is not None:
            raise LabError(f"{place} holds {token!r}, which ends or begins turns here; accepted: texts without it")
    if row.before and not chat.shows(turns):
        raise LabError(f"{place}: the chat template does not show all of its turns; accepted: one that does")


def encoded(rows: list[TrainRow], chat: ChatFormat, train_on: str, say: Say) -> list[Encoded]:
    """Return rows as token ids; tells how many are longer than the limit.

    Args:
        rows: The rows.
        chat: The chat format.
        train_on: Which answers of a conversation are learned (``Task.train_on``).
        say: Told what was cut.

    Raises:
        LabError: If a text holds a control token, or the template does not show all turns.
    """
    for row in rows:
        check_shown(row, chat)
    examples = []
    for row in rows:
        if row.before and train_on == "assistant":
            examples += chat.encode_every([*row.before, Turn("user", row.prompt), Turn("assistant", row.response)])
        else:
            examples.append(chat.encode(row.asked, row.response))
    endless = sum(example.labels[-1] != chat.end_id for example in examples)
    more = f", {endless} of their answers from the right, so that no end is taught" if endless else ""
    if any(row.before for row in rows):
        more += "; of conversations the oldest turns are left out, with the answers in them"
    for line in chat.told_cut(sum(example.cut for example in examples), len(examples), "training rows", more):
        say(line)
    return examples
