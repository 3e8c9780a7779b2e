"""The stages of a run, in their order: load, start, rows, artefacts, fit, drift, export, answers, verdicts, record.

Each stage is saved as it ends.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from cwac_lab.config.run import Run
from cwac_lab.core.cache import write_text
from cwac_lab.core.provenance import StageMeter
from cwac_lab.data import mixing
from cwac_lab.data.mixing import TrainRow
from cwac_lab.data.sources import TaskData
from cwac_lab.data.suites import Suite
from cwac_lab.defenses.cwac.null_space import attach
from cwac_lab.defenses.interface import Context, finish, settled
from cwac_lab.diagnostics.callback import Sampler
from cwac_lab.diagnostics.probe import Probe
from cwac_lab.evaluation.protocol import answered, evaluation_rows, judge, remarks, suite_rows
from cwac_lab.models import shipped
from cwac_lab.models.chat import ChatFormat, Encoded
from cwac_lab.models.exporting import export
from cwac_lab.report import card
from cwac_lab.report.console import Screen
from cwac_lab.report.tracking import log_run
from cwac_lab.results import store
from cwac_lab.results.store import RunFolder
from cwac_lab.run import ability, course, edited, guarded
from cwac_lab.run.artefacts import artefacts, check_free
from cwac_lab.run.drift import measured_in, probe
from cwac_lab.run.protected import held_share
from cwac_lab.run.rows import encoded, train_rows, with_beginnings, words_of
from cwac_lab.run.start import Start
from cwac_lab.run.suite_answers import own_answers, with_start
from cwac_lab.run.survey import survey, told
from cwac_lab.training.checkpoint import resumed
from cwac_lab.training.loop import check_finite, fit, loggers, n_steps

Asked = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Job:
    """What a run is made of before its first stage.

    Attributes:
        run: The configuration.
        folder: Where it is recorded.
        begin: The start weights and the prompt pools.
        data: The task's rows.
        suites: Named suites that are asked beside the run's own prompts.
        facts: What runs, by the names of ``store.FACTS``.
        screen: What the user reads.
        meter: Seconds and memory by stage.
    """

    run: Run
    folder: RunFolder
    begin: Start
    data: TaskData
    suites: dict[str, Suite]
    facts: dict[str, Any]
    screen: Screen
    meter: StageMeter


def carry_through(job: Job) -> None:
    """Carry a run through all its stages and write its record."""
    run, folder = job.run, job.folder
    with job.meter.stage("load"):
        model, chat = job.begin.load(run)
    job.screen.banner(job.begin.folder.description, _banner(run, folder))
    for remark in chat.remarks:
        job.screen.say(remark)
    logged: AbstractContextManager[list[Any]] = nullcontext([])
    if folder.writes:
        logged = loggers(run.logger, folder.path, folder.path.name, run.resolved)
    with logged as made:
        rows = _rows(job, model, chat) if run.finetune else []
        words = words_of(run, rows, job.screen.say)
        asked = _asked(job, model, chat, words)
        begun = _start_on_text(job, model, chat)
        tuned = _fine_tune(job, model, chat, made, rows, asked) if run.finetune else {}
        with job.meter.stage("attack") if run.attack.abliterate else nullcontext():
            tuned |= edited.edit(run, job.begin.pools, model, chat, job.screen.say)
        if run.evaluation.perplexity:
            with job.meter.stage("plain_text"):
                tuned |= ability.on_plain_text(run, model, chat, begun)
        metrics = _evaluate(job, asked, model, chat)
        if not folder.writes:
            return
        leak = tuned.get("constraint_summary", {}).get("leak")
        told = {"leak": leak} if leak is not None else {}
        told |= {"suites": {name: suite.facts for name, suite in job.suites.items()}} if job.suites else {}
        told |= {"words": words} if words else {}
        record = {**job.facts, **metrics, **told, "stages": job.meter.stages, **tuned}
        folder.write(store.METRICS, record)
        _ask_harness(job, model, chat, record)
        write_card(run, folder, record)
        log_run(made, folder, job.screen.say)
    job.screen.result(title(record), record)


def _export(job: Job, model: Any, chat: ChatFormat) -> None:
    """Save a trained model where that is asked for."""
    run = job.run
    if run.trainer.export and store.MODEL in run.tuning.saved and job.folder.writes:
        with job.meter.stage("export"):
            export(model, chat, job.folder.path / store.MODEL, job.begin.folder.path)


def _save_adapter(job: Job, model: Any) -> None:
    """Save the factors of a trained model, as they are used, before they are merged."""
    run = job.run
    if run.trainer.export and store.ADAPTER in run.tuning.saved and job.folder.writes:
        hub, at, _ = job.begin.folder.content.partition("@")  # of weights of the hub as they are
        base = hub if at and job.begin.before is None else str(job.begin.folder.path)
        with settled(run.constraint, model):
            shipped.save_adapter(model, run.tuning, job.folder.path / store.ADAPTER, torch.float32, base)


def write_card(run: Run, folder: RunFolder, record: dict[str, Any]) -> None:
    """Write the model card beside what was saved of a model."""
    for path in (folder.path / store.MODEL, folder.path / store.ADAPTER):
        if path.is_dir() and run.finetune:
            provenance = folder.read(store.PROVENANCE)
            adapter = path.name == store.ADAPTER
            text = card.card(run.resolved, record, provenance, folder.path.name, adapter=adapter)
            write_text(path / card.FILE, text)


def _banner(run: Run, folder: RunFolder) -> dict[str, Any]:
    as_it_came = run.model.given and run.model.align == "none"
    return {
        **({"start": "taken as it came; model.align=refusals teaches it to refuse first"} if as_it_came else {}),
        "task": f"{run.task.name}, {run.data.source} data",
        "constraint": run.method,
        "trained": run.tuning.title if run.finetune else "-",
        "harmful ratio": f"{run.harmful_ratio:g}" if run.finetune else "-",
        "seed": run.seed,
        "evaluated on": run.evaluation.split,
        "record": folder.path,
    }


def _rows(job: Job, model: Any, chat: ChatFormat) -> list[TrainRow]:
    """Return the rows to train on."""
    with job.meter.stage("rows"):
        return train_rows(job.run, job.data.train, job.begin.pools, model, chat, job.screen.say)


def _fine_tune(
    job: Job, model: Any, chat: ChatFormat, loggers: list[Any], rows: list[TrainRow], asked: Asked
) -> dict[str, Any]:
    """Prepare the constraint, train on rows; returns facts for the record."""
    run, defense, say = job.run, job.run.constraint, job.screen.say
    with job.meter.stage("rows"):
        # What cannot be shown is told before hours of work.
        ids = [example.input_ids for example in encoded(rows, chat, run.task.train_on, lambda _: None)]
        run = with_beginnings(run, job.begin, model, chat, say, rows)
    context, prepared, share = _prepared(job, run, model, chat)
    drift = _probe(job, model, chat, context)
    watched = _course(job, model, chat, asked)
    guard = guarded.guard(run, model, chat, context, job.folder)
    with job.meter.stage("prepare"):
        spec = run.constraint.requirements.subspace
        merge = attach(model, run.tuning, run.seed, spec, context.subspace, ids, chat.pad_id)
        defense.prepare(context)
    rows = defense.wrap_dataset(rows)
    _write_manifest(job, rows)
    bad = sum(row.harmful for row in rows)
    say(f"fine-tuning on {len(rows)} rows, {bad} of them harmful: constraint={run.constraint_name}")
    examples = encoded(rows, chat, run.task.train_on, say)
    seen = _survey(job, rows, examples)
    sampler = _sampler(job, drift, measured_in(prepared)) if drift and run.diagnostics.every_n_steps else None
    steps = n_steps(examples, run.trainer, run.seed)
    follower = course.sampler(watched, run, job.folder, steps) if watched else None
    called = [each for each in (sampler, follower, guard) if each]
    with job.meter.stage("train"):
        trained = fit(
            model, examples, chat.pad_id, defense, run.trainer, run.seed, loggers=loggers,
            checkpoint=job.folder.path / store.CHECKPOINT, callbacks=called, others=guard.refusals if guard else (),
        )  # fmt: skip
        _save_adapter(job, model)
        finish(defense, model, merge)
        check_finite(model, examples[0], chat.pad_id)
    _export(job, model, chat)
    told: dict[str, Any] = {} if share is None else {"held_share": share}
    ended = int(trained["steps"])
    if guard is not None:
        told["guard"] = guard.facts()
        ended = _guarded(job, told["guard"], ended)
    if drift is not None:
        with job.meter.stage("diagnose"):
            found = drift.measure(model)
            job.folder.write(store.DRIFT, {"measured_in": measured_in(prepared), **found})
            if sampler is not None:
                sampler.end(ended, found["summary"])
    followed = {}
    if watched is not None and follower is not None:
        follower.end(ended, watched(model))
        followed = course.told(job.folder, say) if job.folder.writes else {}  # others may not see it yet
    cut = sum(example.cut for example in examples)
    trained |= {"rows_cut": cut} if cut else {}
    return {
        "training": trained | seen,
        "constraint_summary": defense.summary(),
        "prepared": prepared,
        **told,
    } | followed


def _prepared(job: Job, run: Run, model: Any, chat: ChatFormat) -> tuple[Context, dict[str, Any], float | None]:
    """Return what the constraint needs, facts of it for the record, and what share of prompts to come it holds."""
    with job.meter.stage("prepare"):
        context, prepared = artefacts(run, job.begin, model, chat, job.screen.say)
        check_free(run, context)
        return context, prepared, held_share(run, job.begin, context, prepared, chat)


def _guarded(job: Job, facts: dict[str, Any], ended: int) -> int:
    """Tell what a guard did; returns the step whose weights are kept, of a training that ended at a step."""
    job.screen.say(guarded.told(facts))
    back: int | None = facts["rolled_back_to"]
    return ended if back is None else back


def _course(job: Job, model: Any, chat: ChatFormat, asked: Asked) -> course.Course | None:
    """Return what follows refusals while the model is trained, where the run asks for it and has harmful prompts."""
    rows = asked["harmful"]
    return course.Course(job.run, rows, model, chat) if job.run.evaluation.every_n_steps and rows else None


def _survey(job: Job, rows: list[TrainRow], examples: list[Encoded]) -> dict[str, Any]:
    """Tell what rows of one's own are like."""
    if not job.run.task.remarks:
        return {}
    found = survey(rows, examples, job.begin.pools.harmful())
    for line in told(found):
        job.screen.say(line)
    return {"rows": found}


def _probe(job: Job, model: Any, chat: ChatFormat, context: Context) -> Probe | None:
    """Return what the start is measured by, where the run asks for it."""
    if not job.run.diagnostics.enabled:
        return None
    with job.meter.stage("probe"):
        return probe(job.run, job.begin, model, chat, context)


def _write_manifest(job: Job, rows: list[TrainRow]) -> None:
    pools = job.begin.pools
    told = {"mixture": mixing.manifest(rows), "pools": pools.manifest(), "cut": pools.cut, "alike": pools.alike}
    job.folder.write(store.MANIFEST, told)


def _sampler(job: Job, drift: Probe, measured: dict[str, str]) -> Sampler:
    """Return what measures drift while the model is trained; a resumed run goes on with the samples that there are."""
    folder = job.folder
    goes_on = resumed(folder.path / store.CHECKPOINT) and folder.has(store.SAMPLES)
    earlier = folder.read(store.SAMPLES)["samples"] if goes_on else []

    def record(samples: list[dict[str, Any]]) -> None:
        folder.write(store.SAMPLES, {"measured_in": measured, **drift.facts, "samples": samples})

    every = job.run.diagnostics.every_n_steps
    return Sampler("drift", lambda model: dict(drift.measure(model)["summary"]), every, earlier, record)


def _asked(job: Job, start: Any, chat: ChatFormat, words: list[str]) -> Asked:
    """Return what is asked in the end; beside harmful prompts what the start answers, where it is to be fine-tuned."""
    run, begin = job.run, job.begin
    rows = evaluation_rows(run, begin.pools, job.data, words) | suite_rows(run, job.suites)
    if not run.finetune:
        return rows
    with job.meter.stage("start"):
        return with_start(run, rows, begin, start, chat, job.screen.say)


def _start_on_text(job: Job, start: Any, chat: ChatFormat) -> list[tuple[float, int]] | None:
    """Return the start's losses on plain text, where it is to be fine-tuned and what it forgets is asked for."""
    if not (job.run.finetune and job.run.evaluation.perplexity):
        return None
    with job.meter.stage("start"):
        return ability.start_losses(job.run, job.begin.folder.content, start, chat, job.screen.say)


def _ask_harness(job: Job, model: Any, chat: ChatFormat, record: dict[str, Any]) -> None:
    """Ask the harness's tasks, where there are any, and write the record again; it is there already if they fail."""
    if job.run.evaluation.lm_eval:
        with job.meter.stage("lm_eval"):
            record |= ability.of_harness(job.run, model.to(job.run.trainer.device), chat, job.screen.say)
        job.folder.write(store.METRICS, record)


def _evaluate(job: Job, asked: Asked, model: Any, chat: ChatFormat) -> dict[str, Any]:
    """Answer, judge and aggregate; every stage is saved before the next."""
    run, folder = job.run, job.folder
    job.screen.say(f"evaluating on the {run.evaluation.split} split")
    with job.meter.stage("evaluate"):
        given = answered(run, asked, model, chat)
        if not run.finetune:
            given = own_answers(given)
        folder.write(store.GENERATIONS, given)
        for line in remarks(given, chat):
            job.screen.say(line)
        return judge(run, folder) if folder.writes else {}


def title(record: dict[str, Any]) -> str:
    """Return one line that says which weights ran and how."""
    mixture = "" if record["harmful_ratio"] is None else f" | harmful ratio {record['harmful_ratio']:g}"
    return f"{record['weights']} | {record['task']} | {record['constraint']}{mixture} | {record['split']} split"
