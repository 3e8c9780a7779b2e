"""What a fine-tuned model is asked, what it answers, and what judges say: the stages of evaluation."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from cwac_lab.core import distributed
from cwac_lab.data.attacks import AttackConfig
from cwac_lab.data.forms import OWN, SYSTEM, WORDS
from cwac_lab.data.pools import Pools
from cwac_lab.data.sources import TaskData
from cwac_lab.data.suites import Suite, SuiteConfig
from cwac_lab.data.tasks.base import Task
from cwac_lab.evaluation.combined import combined_of
from cwac_lab.evaluation.engines import ENGINES
from cwac_lab.evaluation.heldout import losses, mean_loss
from cwac_lab.evaluation.metrics import METRICS, PROMPT_KINDS, Judged
from cwac_lab.evaluation.settings import EvaluationConfig
from cwac_lab.evaluation.verdicts import aggregate, agreement, judge_rows, unparsable
from cwac_lab.judges import all_made, made
from cwac_lab.judges import told as told_of
from cwac_lab.judges.base import Judge
from cwac_lab.models.chat import ChatFormat, Prompt
from cwac_lab.models.templates import Turn
from cwac_lab.results import store
from cwac_lab.results.store import RunFolder


class Evaluated(Protocol):
    """What of a run its evaluation depends on."""

    evaluation: EvaluationConfig
    task: Task
    attack: AttackConfig
    suites: dict[str, SuiteConfig]
    cache_root: str


def evaluation_rows(
    run: Evaluated, pools: Pools, data: TaskData, words: Sequence[str] = ()
) -> dict[str, list[dict[str, Any]]]:
    """Return what is asked of the model: prompts of the chosen split by kind, and the task's rows.

    Where the task's rows have a system prompt, prompts are asked under it as well, apart from the others; then each row
    says in which ``form`` it is asked. So does each harmful prompt that is asked again behind ``words``, by turns, and
    under the system prompt where there is one.
    """
    split, most = run.evaluation.split, run.evaluation.n_prompts
    system = run.task.system if run.task.system_rates else None
    marks: dict[str, dict[str, Any]] = {"": {}}
    if system is not None:
        marks = {"": {"form": OWN}, f", {SYSTEM}": {"form": SYSTEM, "before": [["system", system]]}}
    rows: dict[str, list[dict[str, Any]]] = {
        f"{kind}{more}": [
            {"kind": kind, "id": row.id, "prompt": run.attack.asked(row.prompt), **marked}
            for row in pools.get(kind, split)[:most]
        ]
        for more, marked in marks.items()
        for kind in PROMPT_KINDS
    }
    if words:
        again = zip(rows["harmful" if system is None else f"harmful, {SYSTEM}"], itertools.cycle(words), strict=False)
        rows[f"harmful, {WORDS}"] = [{**row, "prompt": each + row["prompt"], "form": WORDS} for row, each in again]
    asked = data.test if split == "test" else data.validation
    rows["task"] = [
        {"kind": "task", "id": row.id, "prompt": row.prompt, "gold": row.gold}
        | ({"before": [list(turn) for turn in row.before]} if row.before else {})
        | ({"response": row.response} if run.task.held_out_loss else {})
        for row in asked
    ]
    return rows


def suite_rows(run: Evaluated, suites: Mapping[str, Suite]) -> dict[str, list[dict[str, Any]]]:
    """Return what is asked of the model for named suites, by suite and kind, as ``evaluation_rows`` does."""
    return {
        f"{kind}, {name}": [
            {"kind": kind, "id": row.id, "suite": name, "prompt": run.attack.asked(row.prompt)}
            | ({"category": row.category} if row.category is not None else {})
            for row in rows
        ]
        for name, suite in suites.items()
        for kind, rows in suite.rows.items()
        if rows
    }


def answered(
    run: Evaluated, rows: dict[str, list[dict[str, Any]]], model: Any, chat: ChatFormat
) -> list[dict[str, Any]]:
    """Return the rows with the model's answers, asked as the attack asks.

    A row whose prompt is longer than the limit is marked ``cut``, one whose answer began with thoughts ``thoughts``.
    """
    asking = chat.with_template(run.attack.template)
    engine = ENGINES[run.evaluation.engine](model, asking, run.evaluation.batch_size)
    found, device = [], model.device
    for kind, asked in rows.items():
        longest = run.task.max_new_tokens if kind == "task" else run.evaluation.max_new_tokens
        opening = "" if kind == "task" else run.attack.prefill
        ask = partial(engine, max_new_tokens=longest, opening=opening)
        given = distributed.spread([prompt_of(row) for row in asked], ask)
        forced = {"opening": opening} if opening else {}
        for row, answer in zip(asked, given, strict=True):
            marks = {"cut": bool(asking.n_cut([prompt_of(row)])), "thoughts": answer.thoughts}
            marked = {mark: True for mark, holds in marks.items() if holds}
            found.append({**row, **forced, "output": answer.text, **marked})
    held = [row for row in found if "response" in row]
    if held and model.device != device:  # an engine of its own took the place of the model
        model.to(device)
    lost = partial(losses, model, chat, batch_size=run.evaluation.batch_size)
    found_losses = distributed.spread([(prompt_of(row), row["response"]) for row in held], lost)
    for row, loss in zip(held, found_losses, strict=True):
        row["loss"] = list(loss)
    return found


def prompt_of(row: dict[str, Any]) -> Prompt:
    """Return what a row asks: its prompt, or the conversation that it ends."""
    if "before" not in row:
        return str(row["prompt"])
    return [Turn(role, text) for role, text in (*row["before"], ("user", row["prompt"]))]


def remarks(rows: list[dict[str, Any]], chat: ChatFormat) -> Iterator[str]:
    """Yield what is to be told of rows that ``answered`` returned."""
    yield from chat.told_cut(sum("cut" in row for row in rows), len(rows), "prompts")
    if thoughtful := [row for row in rows if "thoughts" in row]:
        silent = sum(not row["output"] for row in thoughtful)
        yield (
            f"{len(thoughtful)} of {len(rows)} answers begin with thoughts, which are left out; {silent} of them go no "
            "further within the limit of new tokens and count as empty"
        )


def judge(run: Evaluated, folder: RunFolder) -> dict[str, Any]:
    """Judge saved generations and write verdicts; returns the aggregates (stages 2 and 3).

    The rates are the first judge's, those of a suite its own judge's where it names one; ``judges`` has the versions of
    all, and of the others rates and agreement.
    """
    generations = folder.read(store.GENERATIONS)
    endpoint = (run.evaluation.endpoint, run.cache_root)
    judges = all_made(run.evaluation.judges, *endpoint)
    named = {name: suite.judge for name, suite in run.suites.items() if suite.judge is not None}
    own = {name: made(judge, *endpoint) for name, judge in named.items() if judge != judges[0].name}
    first, *others = [judge_rows(generations, run.task, each) for each in judges]  # all, before any is written
    for name, each in own.items():
        first = _judged_by(first, generations, name, run.task, each)
    folder.discard(store.verdicts_of("*"), {store.verdicts_of(other.name) for other in judges[1:]})
    folder.write(store.VERDICTS, first)
    told: dict[str, Any] = {judges[0].name: {**told_of(judges[0]), "unparsable": unparsable(first, judges[0].name)}}
    for other, found in zip(judges[1:], others, strict=True):
        folder.write(store.verdicts_of(other.name), found)
        rates = {rate: value for rate, value in aggregate(found).items() if rate not in METRICS or METRICS[rate].judged}
        told[other.name] = {**told_of(other), **rates, "agreement": agreement(first, found)}
    loss = mean_loss(generations)
    more = {name: each.rate([first]).to_dict() for name, each in combined_of(first).items()}
    judged = {"suite_judges": {name: f"{each.name} {each.version[:8]}" for name, each in own.items()}} if own else {}
    return {**aggregate(first), **more, **({"held_out_loss": loss.to_dict()} if loss else {}), "judges": told, **judged}


def _judged_by(
    verdicts: list[Judged], generations: list[dict[str, Any]], suite: str, task: Task, judge: Judge
) -> list[Judged]:
    """Return verdicts with those of a suite by another judge."""
    places = [at for at, row in enumerate(generations) if row.get("suite") == suite]
    given = judge_rows([generations[at] for at in places], task, judge)
    of_suite = dict(zip(places, given, strict=True))
    return [of_suite.get(at, verdict) for at, verdict in enumerate(verdicts)]
