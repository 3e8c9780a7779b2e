"""The named suites of a run: which prompts are asked, and asking them of a run that is finished already."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from cwac_lab.config.run import Run, suites_of
from cwac_lab.core import distributed
from cwac_lab.core.cache import digest
from cwac_lab.core.overrides import typed
from cwac_lab.data.pools import Pools
from cwac_lab.data.sources import TaskData
from cwac_lab.data.suites import Suite, apart
from cwac_lab.evaluation.protocol import answered, judge, remarks, suite_rows
from cwac_lab.evaluation.verdicts import START_OUTPUT
from cwac_lab.judges import all_made
from cwac_lab.models.chat import ChatFormat
from cwac_lab.models.loading import load_model
from cwac_lab.results import store
from cwac_lab.results.store import RunFolder
from cwac_lab.run.edited import edit
from cwac_lab.run.start import Start
from cwac_lab.run.start_answers import start_answers

Say = Callable[[str], None]
Rows = dict[str, list[dict[str, Any]]]
# Of the runs of one process, which mostly ask the same.
_known: dict[str, dict[str, Suite]] = {}


def chosen(run: Run, pools: Pools, data: TaskData, say: Say) -> dict[str, Suite]:
    """Return the suites that a run is asked, without prompts that it has seen; none while settings are chosen.

    Raises:
        MissingAsset: If a suite is not there.
        ConfigError: If nothing is left of one.
    """
    if run.suites and run.evaluation.split != "test":
        say("evaluation.suites are asked with evaluation.split=test only, not while settings are chosen")
        return {}
    groups = {group: run.resolved.get(group) for group in ("suites", "data", "task", "attack")}
    key = digest([groups, run.evaluation.n_prompts])
    if key not in _known:
        others = [row.prompt for row in run.attack.others(()) or ()]
        _known[key] = apart(run.suites, run.data, pools, data, run.evaluation.n_prompts, others)
    found = _known[key]
    for line in _told(found):
        say(line)
    return found


def _told(suites: Mapping[str, Suite]) -> Iterator[str]:
    for name, suite in suites.items():
        counts = " and ".join(f"{len(rows)} {kind}" for kind, rows in suite.rows.items())
        left_out = f"; {suite.dropped} are left out, as this run has seen them or near ones" if suite.dropped else ""
        yield f"suite {name}: {counts} prompts{left_out}"


def with_start(run: Run, rows: Rows, begin: Start, start: Any, chat: ChatFormat, say: Say) -> Rows:
    """Return rows with what the start answers beside harmful prompts, each form and suite apart."""
    found = dict(rows)
    for name, asked in rows.items():
        if asked and asked[0]["kind"] == "harmful":  # apart: other runs ask some of them
            given = start_answers(run, asked, begin.folder.content, start, chat, say)
            found[name] = [{**row, START_OUTPUT: text} for row, text in zip(asked, given, strict=True)]
    return found


def own_answers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows that a start was asked: its own answers are the start's."""
    return [{**row, START_OUTPUT: row["output"]} if row["kind"] == "harmful" else row for row in rows]


def ask_more(
    run: Run, folder: RunFolder, begin: Start, suites: Mapping[str, Suite], metrics: dict[str, Any], say: Say
) -> list[str]:
    """Ask the model of a finished run the suites that it was not asked; returns what cannot be asked.

    Args:
        run: What is asked for.
        folder: The finished run.
        begin: Its start.
        suites: The suites that are asked for.
        metrics: Its record, which is rewritten with the rates of the suites.
        say: Told what is asked.
    """
    known = metrics.get("suites", {})
    new = {name: suite for name, suite in suites.items() if known.get(name) != suite.facts}
    recorded = folder.config().get("suites", {})
    for name, suite in suites.items():
        if name not in new and suite.judge != (recorded.get(name) or {}).get("judge"):
            say(f"suites.{name}.judge={suite.judge}: its answers are judged as before; force=true repeats the run")
    others = _other(folder, new)
    lacking = [f"rates of {name} on other prompts than those recorded (give it another name)" for name in others]
    new = {name: suite for name, suite in new.items() if name not in others}
    if not new:
        return lacking
    named = f"rates of {', '.join(new)} (evaluation.suites)"
    if distributed.world() > 1 or not folder.has(store.GENERATIONS):
        return [*lacking, f"{named} nor answers of before"]
    if run.finetune and not folder.has(store.MODEL):
        save = "" if store.MODEL in run.tuning.saved else " tuning.save=both"
        return [*lacking, f"{named} nor a model to ask (trainer.export=true{save})"]
    judges = list(metrics["judges"])  # the record is judged as it was
    made = all_made(judges, run.evaluation.endpoint, run.cache_root)
    if older := [each.name for each in made if metrics["judges"][each.name]["version"] != each.version]:
        command = f"python -m cwac_lab.evaluate {typed('run', folder.path)}"
        return [*lacking, f"{named}: {' and '.join(older)} judged it by an older rule ({command} judges it anew)"]
    say(f"asking the saved model: {', '.join(new)}" if run.finetune else f"asking the start: {', '.join(new)}")
    model, chat = begin.load(run)
    rows = suite_rows(run, new)
    if run.finetune:
        rows = with_start(run, rows, begin, model, chat, say)
        del model
        gc.collect()
        model = load_model(folder.path / store.MODEL, run.dtype, run.trainer.device)
        edit(run, begin.pools, model, chat, say)
    given = answered(run, rows, model, chat)
    for line in remarks(given, chat):
        say(line)
    kept = [row for row in folder.read(store.GENERATIONS) if row.get("suite") not in new]
    folder.write(store.GENERATIONS, kept + (given if run.finetune else own_answers(given)))
    settings = folder.config()
    suites_asked = settings.get("suites", {}) | run.resolved["suites"]
    folder.write(store.CONFIG, settings | {"suites": suites_asked})
    evaluation = replace(run.evaluation, judges=judges)
    run = replace(run, suites=suites_of(suites_asked), evaluation=evaluation)  # those of before keep their judges
    told = known | {name: suite.facts for name, suite in new.items()}
    folder.write(store.METRICS, {**metrics, **judge(run, folder), "suites": told})
    return lacking


def _other(folder: RunFolder, suites: Mapping[str, Suite]) -> list[str]:
    """Return the suites of which a run has answers to prompts that are not asked now, which would be lost."""
    held = folder.read(store.GENERATIONS) if folder.has(store.GENERATIONS) else []
    asked = {(name, row.id) for name, suite in suites.items() for rows in suite.rows.values() for row in rows}
    lost = {row["suite"] for row in held if row.get("suite") in suites and (row["suite"], row["id"]) not in asked}
    return [name for name in suites if name in lost]
