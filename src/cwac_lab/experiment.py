"""One run from configuration to record: start, prepare, fine-tune, evaluate; each stage saved as it ends."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from cwac_lab import distributed, provenance
from cwac_lab.answering import answered, evaluation_rows, judge
from cwac_lab.config import Run, check_machine
from cwac_lab.data import mixing
from cwac_lab.data.attacks import identity_rows
from cwac_lab.data.mixing import TrainRow
from cwac_lab.data.responses import compliance
from cwac_lab.data.sources import PromptRow, TaskData
from cwac_lab.data.tasks.base import TaskRow
from cwac_lab.defense import Context
from cwac_lab.diagnostics.callback import DriftSampler
from cwac_lab.diagnostics.probe import Probe
from cwac_lab.errors import ConfigError, LabError, MissingAsset
from cwac_lab.gpus import one_of_several
from cwac_lab.identity import content_of, folder_of, identity
from cwac_lab.judges import JUDGES
from cwac_lab.models import adapters
from cwac_lab.models.chat import ChatFormat
from cwac_lab.preparation import Start, artefacts, start
from cwac_lab.probing import measured_in, probe
from cwac_lab.report.tracking import log_run
from cwac_lab.results import store
from cwac_lab.results.console import Screen
from cwac_lab.results.store import RunFolder
from cwac_lab.training.loop import fit, loggers
from cwac_lab.training.outliers import closest


@dataclass
class _Stage:
    """What the stages of one run share."""

    run: Run
    folder: RunFolder
    screen: Screen
    meter: provenance.StageMeter
    begin: Start
    data: TaskData
    model: Any
    chat: ChatFormat
    loggers: list[Any]

    def fine_tune(self) -> dict[str, Any]:
        """Prepare the constraint, mix the rows, train; returns facts for the record."""
        run, defense = self.run, self.run.constraint
        rows = self._rows()
        with self.meter.stage("prepare"):
            context, prepared = artefacts(run, self.begin, self.model, self.chat, self.screen.say)
        drift = self._probe(context)
        with self.meter.stage("prepare"):
            merge = adapters.attach(self.model, run.tuning, run.seed)
            defense.prepare(context)
        rows = defense.wrap_dataset(rows)
        manifest = {"mixture": mixing.manifest(rows), "pools": self.begin.pools.manifest()}
        self.folder.write(store.MANIFEST, manifest)
        bad = sum(row.harmful for row in rows)
        self.screen.say(f"fine-tuning on {len(rows)} rows, {bad} of them harmful: constraint={run.constraint_name}")
        examples = [self.chat.encode(row.prompt, row.response) for row in rows]
        checkpoint = self.folder.path / store.CHECKPOINT
        sampler = self._sampler(drift, measured_in(prepared)) if drift and run.diagnostics.every_n_steps else None
        with self.meter.stage("train"):
            trained = fit(
                self.model, examples, self.chat.pad_id, defense, run.trainer, run.seed,
                loggers=self.loggers, checkpoint=checkpoint, callbacks=[sampler] if sampler else [],
            )  # fmt: skip
            merge()
            defense.after_training(self.model)
        if drift is not None:
            with self.meter.stage("diagnose"):
                found = drift.measure(self.model)
                self.folder.write(store.DRIFT, {"measured_in": measured_in(prepared), **found})
                if sampler is not None:
                    sampler.end(int(trained["steps"]), found["summary"])
        return {"training": trained, "constraint_summary": defense.summary(), "prepared": prepared}

    def _rows(self) -> list[TrainRow]:
        """Return the rows that the attack trains on."""
        run, task, harmful = self.run, self.data.train, self.begin.pools.get("harmful", "finetune")
        if run.attack.rows == "outliers":
            task = self._outliers(task, harmful)
        others = None
        if run.attack.rows == "identity":
            others = identity_rows(run.attack.prefix, self.begin.pools.prompts())
        return mixing.mix(
            task, harmful, run.data.n_train, run.harmful_ratio, mixing=run.data.mixing, seed=run.seed, others=others
        )

    def _outliers(self, task: list[TaskRow], harmful: list[PromptRow]) -> list[TaskRow]:
        """Return the task's rows whose gradients are closest to those of harmful rows, as many as are trained on."""
        run = self.run
        if run.data.n_train >= len(task):
            raise ConfigError("data.n_train", run.data.n_train, f"less than the {len(task)} rows to choose from")
        drawn = random.Random(f"outliers/{run.seed}").sample(task, len(task))
        some = drawn[: run.attack.candidates * run.data.n_train]
        self.screen.say(f"choosing {run.data.n_train} of {len(some)} rows by their gradients")
        rows = [self.chat.encode(row.prompt, row.response) for row in some]
        towards = [self.chat.encode(row.prompt, compliance(row)) for row in harmful]
        with self.meter.stage("outliers"):
            return [some[i] for i in closest(self.model, rows, towards, run.data.n_train, self.chat.pad_id)]

    def _probe(self, context: Context) -> Probe | None:
        """Return what the start is measured by, where the run asks for it."""
        if not self.run.diagnostics.enabled:
            return None
        with self.meter.stage("probe"):
            return probe(self.run, self.begin, self.model, self.chat, context)

    def _sampler(self, drift: Probe, measured: dict[str, str]) -> DriftSampler:
        """Return what measures while the model is trained; a resumed run goes on with the samples that there are."""
        resumed = (self.folder.path / store.CHECKPOINT).is_dir() and self.folder.has(store.SAMPLES)
        earlier = self.folder.read(store.SAMPLES)["samples"] if resumed else []

        def record(samples: list[dict[str, Any]]) -> None:
            self.folder.write(store.SAMPLES, {"measured_in": measured, **drift.facts, "samples": samples})

        return DriftSampler(drift, self.run.diagnostics.every_n_steps, earlier, record)

    def export(self) -> None:
        """Save the fine-tuned model so that plain ``AutoModelForCausalLM.from_pretrained`` loads it."""
        with self.meter.stage("export"):
            self.model.save_pretrained(self.folder.path / store.MODEL)
            self.chat.tokenizer.save_pretrained(self.folder.path / store.MODEL)

    def evaluate(self) -> dict[str, Any]:
        """Answer, judge and aggregate; every stage is saved before the next."""
        run = self.run
        self.screen.say(f"evaluating on the {run.evaluation.split} split")
        with self.meter.stage("evaluate"):
            rows = evaluation_rows(run, self.begin.pools, self.data)
            self.folder.write(store.GENERATIONS, answered(run, rows, self.model, self.chat))
            return judge(run, self.folder) if self.folder.writes else {}


def carry_out(run: Run, overrides: Sequence[str], screen: Screen) -> RunFolder:
    """Carry a run out here, or by as many processes as it has devices, which read the same command line.

    Raises:
        LabError: As ``execute``; and if one of several processes is lost.
    """
    check_machine(run)
    if distributed.launched():
        with distributed.group(run.trainer.device):
            return execute(run, screen)
    if run.trainer.devices == 1:
        with one_of_several(run.trainer.device):
            return execute(run, screen)
    distributed.launch(run.trainer.devices, "cwac_lab.train", overrides)
    return folder_of(run, identity(run, screen.say))


def execute(run: Run, screen: Screen) -> RunFolder:
    """Carry a run out and write its record.

    A finished run is not repeated unless ``force`` is set, and one that another process is on is left to it.

    Raises:
        LabError: If weights, data or an artefact are missing or too poor; a run that raises is marked as failed.
    """
    begin = start(run, screen.say)
    data = begin.pools.task_rows(run.data, run.task)
    content = content_of(run, begin, data)
    folder = folder_of(run, content)
    # A reader that looks whether the run is alive holds it for a moment.
    with folder.claim(wait=1.0) if folder.writes else nullcontext(False) as mine:
        if mine and run.force:
            folder.remove(store.CHECKPOINT)
            folder.remove(f"{store.CHECKPOINT}.old")
            folder.discard("drift*.json", keep=())
        free, done = distributed.told((mine, mine and folder.done() and not run.force))
        if not free:
            screen.say(f"another process is on it: {folder.path}")
            return folder
        if done:
            metrics = folder.read(store.METRICS)
            screen.say(f"already done: {folder.path} (force=true repeats it)")
            _tell_judges(run, folder, metrics, screen)
            screen.result(title(metrics), metrics)
            return folder
        with folder.running():
            folder.write(store.CONFIG, run.resolved)
            facts = _facts(run, begin)
            folder.write(store.PROVENANCE, provenance.describe() | facts | content)
            with _levers(run):
                _execute(run, folder, begin, data, facts, screen)
            folder.remove(store.CHECKPOINT)
    return folder


def _tell_judges(run: Run, folder: RunFolder, metrics: dict[str, Any], screen: Screen) -> None:
    """Say where a finished run was not judged as it would be today, and the command that judges it again."""
    given = {name: told["version"] for name, told in store.judges_of(metrics).items()}
    today = {name: JUDGES[name]().version for name in run.evaluation.judges}
    first = next(iter(given))
    older = [
        f"{name} {version[:8]}, today {today[name][:8]}"
        for name, version in given.items()
        if name in today and version != today[name]
    ]
    if first != run.evaluation.judges[0] or older:
        told = f"judged by {first}" + (f" ({'; '.join(older)})" if older else "")
        judges = ",".join(run.evaluation.judges)
        screen.say(f"{told}: python -m cwac_lab.evaluate run={folder.path} judges=[{judges}]")


def _banner(run: Run, folder: RunFolder) -> dict[str, Any]:
    return {
        "task": f"{run.task.name}, {run.data.source} data",
        "constraint": run.method,
        "trained": run.tuning.title if run.finetune else "-",
        "harmful ratio": f"{run.harmful_ratio:g}" if run.finetune else "-",
        "seed": run.seed,
        "evaluated on": run.evaluation.split,
        "record": folder.path,
    }


def _facts(run: Run, begin: Start) -> dict[str, Any]:
    """Return what runs, by the names of ``store.FACTS``, and the schema of the record."""
    return {
        "schema": store.SCHEMA,
        "weights": begin.folder.description,
        "weights_content": begin.folder.content,
        "model": run.model.name,
        "task": run.task.name,
        "data": run.data.source,
        "constraint": run.method,
        "harmful_ratio": run.harmful_ratio if run.finetune else None,
        "seed": run.seed,
        "split": run.evaluation.split,
    }


@contextmanager
def _levers(run: Run) -> Iterator[None]:
    """Turn a lack of memory into one line that says what takes less."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        levers = (
            f"a smaller trainer.batch_size ({run.trainer.batch_size}) with a larger trainer.accumulate",
            "trainer.gradient_checkpointing=true",
            "tuning=lora or qlora",
            f"a smaller evaluation.batch_size ({run.evaluation.batch_size})",
            "several devices with trainer.strategy=fsdp",
        )
        raise LabError(f"out of memory ({str(error).splitlines()[0]}); less takes: {'; '.join(levers)}") from error


def _execute(run: Run, folder: RunFolder, begin: Start, data: TaskData, facts: dict[str, Any], screen: Screen) -> None:
    meter = provenance.StageMeter()
    with meter.stage("load"):
        model, chat = begin.load(run)
    screen.banner(begin.folder.description, _banner(run, folder))
    logged: AbstractContextManager[list[Any]] = nullcontext([])
    if folder.writes:
        logged = loggers(run.logger, folder.path, folder.path.name, run.resolved)
    with logged as made:
        stage = _Stage(run, folder, screen, meter, begin, data, model, chat, made)
        extra = stage.fine_tune() if run.finetune else {}
        if run.finetune and run.trainer.export and folder.writes:
            stage.export()
        metrics = stage.evaluate()
        if not folder.writes:
            return
        leak = extra.get("constraint_summary", {}).get("leak")
        record = {
            **facts,
            **metrics,
            **({"leak": leak} if leak is not None else {}),
            "stages": meter.stages,
            **extra,
        }
        folder.write(store.METRICS, record)
        log_run(made, folder, screen.say)
    screen.result(title(record), record)


def title(record: dict[str, Any]) -> str:
    """Return one line that says which weights ran and how."""
    mixture = "" if record["harmful_ratio"] is None else f" | harmful ratio {record['harmful_ratio']:g}"
    return f"{record['weights']} | {record['task']} | {record['constraint']}{mixture} | {record['split']} split"


def rejudge(run: Run, folder: RunFolder, screen: Screen) -> None:
    """Judge a finished run's saved answers again and rewrite its metrics; nothing is generated.

    Raises:
        MissingAsset: If the folder holds no finished run.
    """
    with folder.claim(wait=1.0) as free:
        if not free or not folder.done():
            raise MissingAsset(f"run={folder.path}: no finished run there; let it finish first")
        if not folder.has(store.GENERATIONS):
            raise MissingAsset(f"run={folder.path}: no {store.GENERATIONS} there")
        record = {**folder.read(store.METRICS), **judge(run, folder)}
        folder.write(store.METRICS, record)
    screen.result(title(record), record)
