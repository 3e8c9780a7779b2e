"""One run from configuration to record: start, prepare, fine-tune, evaluate; each stage saved as it ends."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cwac_lab import provenance
from cwac_lab.cache import digest
from cwac_lab.config import INCIDENTAL, Run
from cwac_lab.data import mixing
from cwac_lab.data.pools import Pools
from cwac_lab.data.sources import draw, load_task_rows
from cwac_lab.data.tasks.base import TaskRow
from cwac_lab.errors import ConfigError, LabError
from cwac_lab.evaluation.generate import generate
from cwac_lab.evaluation.verdicts import PROMPT_KINDS, aggregate, judge_rows
from cwac_lab.judges.refusal import RefusalJudge
from cwac_lab.models.chat import ChatFormat
from cwac_lab.models.loading import load_chat, load_model
from cwac_lab.preparation import Start, artefacts, start
from cwac_lab.results import store
from cwac_lab.results.console import Screen
from cwac_lab.results.store import RunFolder
from cwac_lab.training.loop import fit, make_loggers


@dataclass(frozen=True)
class TaskData:
    """Rows of the task, disjoint: to train on, to tune on, to report on."""

    train: list[TaskRow]
    validation: list[TaskRow]
    test: list[TaskRow]


def folder_of(run: Run) -> RunFolder:
    """Return the folder of a run: readable name and the hash of its configuration."""
    method = run.constraint_name if run.finetune else "start"
    key = store.run_key(run.resolved, INCIDENTAL)[:8]
    name = f"{run.model.name}-{run.task.name}-{method}-p{run.harmful_ratio:g}-s{run.seed}-{key}"
    return RunFolder(Path(run.output_root) / "runs" / name)


def task_data(run: Run) -> TaskData:
    """Load and split the task's rows; validation and test do not depend on the run's seed."""
    root = Path(run.data.root) if run.data.root is not None else None
    held = load_task_rows(run.data.source, run.task, "train", root)
    test = load_task_rows(run.data.source, run.task, "test", root)
    for key, n, most in (
        ("n_validation", run.data.n_validation, len(held) - 1),
        ("n_test", run.data.n_test, len(test)),
    ):
        if n > most:
            raise ConfigError(f"data.{key}", n, f"at most {most} rows of task={run.task.name}")
    shuffled = draw(held, len(held), run.data.split_seed)
    tested = {row.prompt for row in test}
    train = [row for row in shuffled[run.data.n_validation :] if row.prompt not in tested]
    return TaskData(train, shuffled[: run.data.n_validation], draw(test, run.data.n_test, run.data.split_seed))


def _fine_tune(run: Run, begin: Start, data: TaskData, model: Any, chat: ChatFormat, folder: RunFolder, meter: provenance.StageMeter, screen: Screen) -> dict[str, Any]:  # fmt: skip  # noqa: E501
    rows = mixing.mix(
        data.train,
        begin.pools.get("harmful", "finetune"),
        n=run.data.n_train,
        ratio=run.harmful_ratio,
        mixing=run.data.mixing,
        seed=run.seed,
    )
    with meter.stage("prepare"):
        context, prepared = artefacts(run, begin, model, chat, screen.say)
        run.constraint.prepare(context)
    rows = run.constraint.wrap_dataset(rows)
    folder.write(store.MANIFEST, {"mixture": mixing.manifest(rows), "pools": begin.pools.manifest()})
    screen.say(f"fine-tuning: {len(rows)} rows ({sum(row.harmful for row in rows)} harmful), {run.constraint_name}")
    loggers = make_loggers(run.logger, folder.path, folder.path.name, run.resolved)
    with meter.stage("train"):
        trained = fit(
            model,
            [chat.encode(row.prompt, row.response) for row in rows],
            chat.pad_id,
            run.constraint,
            run.trainer,
            run.seed,
            loggers=loggers,
            checkpoint=folder.path / store.CHECKPOINT,
        )
        run.constraint.after_training(model)
    return {"training": trained, "constraint": run.constraint.summary(), "prepared": prepared}


def evaluation_rows(run: Run, pools: Pools, data: TaskData) -> dict[str, list[dict[str, Any]]]:
    """Return what is asked of the model, by kind: prompts of the chosen split, and the task's rows."""
    split = run.evaluation.split
    rows: dict[str, list[dict[str, Any]]] = {
        kind: [{"kind": kind, "id": row.id, "prompt": row.prompt} for row in pools.get(kind, split)]
        for kind in PROMPT_KINDS
    }
    asked = data.test if split == "test" else data.validation
    rows["task"] = [{"kind": "task", "id": row.id, "prompt": row.prompt, "gold": row.gold} for row in asked]
    return rows


def _answers(run: Run, rows: dict[str, list[dict[str, Any]]], model: Any, chat: ChatFormat) -> list[dict[str, Any]]:
    answered = []
    for kind, asked in rows.items():
        longest = run.task.max_new_tokens if kind == "task" else run.evaluation.max_new_tokens
        outputs = generate(model, chat, [row["prompt"] for row in asked], longest, run.evaluation.batch_size)
        answered += [{**row, "output": output} for row, output in zip(asked, outputs, strict=True)]
    return answered


def judge(run: Run, folder: RunFolder) -> dict[str, Any]:
    """Judge saved generations and write verdicts; returns the aggregates (stages 2 and 3)."""
    verdicts = judge_rows(folder.read(store.GENERATIONS), run.task, RefusalJudge())
    folder.write(store.VERDICTS, verdicts)
    return aggregate(verdicts)


def _provenance(run: Run, begin: Start, data: TaskData) -> dict[str, Any]:
    prompts = [row.prompt for part in (data.train, data.validation, data.test) for row in part]
    return {
        **provenance.describe(),
        "weights": begin.folder.description,
        "weights_content": begin.folder.content,
        "task_data_sha256": digest(prompts),
        "pools_sha256": digest(
            [[row.prompt for row in rows] for pools in begin.pools.rows.values() for rows in pools.values()]
        ),
        "seed": run.seed,
    }


def execute(run: Run, screen: Screen) -> RunFolder:
    """Carry a run out and write its record; a finished run is not repeated unless ``force`` is set.

    Raises:
        LabError: If weights, data or an artefact are missing or too poor; the run is marked as failed.
    """
    folder = folder_of(run)
    if folder.status == "ok" and not run.force:
        metrics = folder.read(store.METRICS)
        screen.say(f"already done: {folder.path} (force=true repeats it)")
        screen.result(metrics["weights"], metrics)
        return folder
    folder.mark("running")
    folder.write(store.CONFIG, run.resolved)
    try:
        _execute(run, folder, screen)
    except LabError as error:
        folder.mark("failed", str(error))
        raise
    folder.mark("ok")
    return folder


def _execute(run: Run, folder: RunFolder, screen: Screen) -> None:
    meter = provenance.StageMeter()
    with meter.stage("start"):
        begin = start(run, screen.say)
        data = task_data(run)
        model = load_model(begin.folder.path, run.trainer.dtype)
        chat = load_chat(begin.folder.path, run.trainer.max_length, run.model.chat_template)
    method = run.constraint_name if run.finetune else "aligned start, not fine-tuned"
    facts = {
        "task": f"{run.task.name}, {run.data.source} data",
        "constraint": method,
        "harmful ratio": run.harmful_ratio,
        "seed": run.seed,
        "evaluated on": run.evaluation.split,
        "record": folder.path,
    }
    screen.banner(begin.folder.description, facts)
    folder.write(store.PROVENANCE, _provenance(run, begin, data))
    extra: dict[str, Any] = {}
    if run.finetune:
        extra = _fine_tune(run, begin, data, model, chat, folder, meter, screen)
        if run.trainer.export:
            with meter.stage("export"):
                model.save_pretrained(folder.path / "model")
                chat.tokenizer.save_pretrained(folder.path / "model")
    screen.say(f"evaluating on the {run.evaluation.split} split")
    with meter.stage("evaluate"):
        folder.write(store.GENERATIONS, _answers(run, evaluation_rows(run, begin.pools, data), model, chat))
        metrics = judge(run, folder)
    leak = extra.get("constraint", {}).get("leak")
    record = {
        "weights": begin.folder.description,
        "model": run.model.name,
        "task": run.task.name,
        "data": run.data.source,
        "constraint": run.constraint_name if run.finetune else "start",
        "harmful_ratio": run.harmful_ratio,
        "seed": run.seed,
        "split": run.evaluation.split,
        **metrics,
        **({"leak": leak} if leak is not None else {}),
        "stages": meter.stages,
        **extra,
    }
    folder.write(store.METRICS, record)
    screen.result(f"{begin.folder.description} | {method} | p = {run.harmful_ratio:g}", record)
