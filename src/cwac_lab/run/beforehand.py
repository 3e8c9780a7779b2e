"""What a run reads of its rows and prompts before its start is loaded, so that bad input costs little time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from cwac_lab.config.run import Run
from cwac_lab.data.pools import Pools
from cwac_lab.data.suites import Suite
from cwac_lab.data.tasks.base import TaskData, TaskRow
from cwac_lab.defenses.interface import overrides
from cwac_lab.evaluation.protocol import evaluation_rows, suite_rows
from cwac_lab.models.chat import ChatFormat, Encoded
from cwac_lab.run import course
from cwac_lab.run.rows import check_chosen, check_shown, encoded, train_rows
from cwac_lab.training.loop import n_steps

Say = Callable[[str], None]


def check_mixture(run: Run, task: list[TaskRow], pools: Pools, chat: ChatFormat, say: Say) -> None:
    """Check that rows can be mixed, and shown to the model.

    Raises:
        ConfigError: If there are too few of them, or too few steps to look at.
        LabError: If the words of one are no words to the model.
    """
    if run.attack.rows == "outliers":  # which of them is known once the model is there
        check_chosen(run, task)
        return
    rows = train_rows(run, task, pools, None, chat, say)
    for row in rows:
        check_shown(row, chat)
    if _looks(run, pools):
        check_course(run, pools, encoded(rows, chat, run.task.train_on, lambda _: None))


def check_course(run: Run, pools: Pools, examples: Sequence[Encoded]) -> None:
    """Check that a run that is looked at while it trains is longer than that, where its defence adds no rows.

    Raises:
        ConfigError: If not.
    """
    if _looks(run, pools):
        course.check_steps(run, n_steps(examples, run.trainer, run.seed))


def _looks(run: Run, pools: Pools) -> bool:
    watched = run.evaluation.every_n_steps and pools.get("harmful", run.evaluation.split)
    return bool(watched) and not overrides(run.constraint, "wrap_dataset")


def tell_control(
    run: Run, pools: Pools, data: TaskData, suites: Mapping[str, Suite], chat: ChatFormat, say: Say
) -> None:
    """Tell which prompts hold words that the model reads as the end or beginning of a turn."""
    asked = evaluation_rows(run, pools, data) | suite_rows(run, suites)
    held: dict[str, str] = {}
    for row in (row for rows in asked.values() for row in rows):
        for text in (row["prompt"], *(text for _, text in row.get("before", ()))):
            if (token := chat.control_in(text)) is not None:
                held[row["id"]] = token
    if held:
        first, token = next(iter(held.items()))
        say(f"{len(held)} prompts hold what ends or begins turns here, and are asked so: {first} holds {token!r}")
