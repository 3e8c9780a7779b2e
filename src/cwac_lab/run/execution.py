"""One run carried out: by how many processes, whether it is done already, and who writes it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

import torch

from cwac_lab.config.run import Run, check_machine
from cwac_lab.core import distributed, provenance
from cwac_lab.core.errors import Diverged, LabError, MissingAsset
from cwac_lab.core.gpus import one_of_several
from cwac_lab.core.outputs import writable
from cwac_lab.data.pools import build_pools
from cwac_lab.evaluation.protocol import judge
from cwac_lab.evaluation.verdicts import HARMFULNESS
from cwac_lab.report.console import Screen
from cwac_lab.results import store
from cwac_lab.results.store import RunFolder
from cwac_lab.run import ability, stages
from cwac_lab.run.afterwards import catch_up
from cwac_lab.run.beforehand import check_mixture, tell_control
from cwac_lab.run.estimate import check_room
from cwac_lab.run.identity import content_of, folder_of, identity
from cwac_lab.run.push import check as check_push
from cwac_lab.run.push import push
from cwac_lab.run.stages import Job, title
from cwac_lab.run.start import Start, start
from cwac_lab.run.suite_answers import chosen


def carry_out(run: Run, overrides: Sequence[str], screen: Screen) -> RunFolder:
    """Carry a run out here, or by as many processes as it has devices, which read the same command line.

    Raises:
        LabError: As ``execute``; and if one of several processes is lost.
    """
    check_machine(run)
    check_push(run)
    writable("output_root", run.output_root, "runs")
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
    pools = build_pools(run.data)
    data = pools.task_rows(run.data, run.task)  # a bad row stops here, before a start is trained
    for line in (*run.task.remarks, *data.remarks):
        screen.say(line)
    suites = chosen(run, pools, data, screen.say)
    begin = start(run, screen.say, pools)
    content = content_of(run, begin, data)
    folder = folder_of(run, content)
    # A reader that looks whether the run is alive holds it for a moment.
    with folder.claim(wait=1.0) if folder.writes else nullcontext(False) as mine:
        if mine and run.force:
            _forget(folder)
        free, done = distributed.told((mine, mine and folder.done() and not run.force))
        if not free:
            screen.say(f"another process is on it: {folder.path}")
            return folder
        if done:
            metrics = folder.read(store.METRICS)
            screen.say(f"already done: {folder.path} (force=true repeats it)")
            screen.result(title(metrics), metrics)
            if folder.writes:
                catch_up(run, folder, begin, suites, metrics, screen.say)
            return folder
        check_room(run, begin.folder.path)
        with folder.running():
            folder.write(store.CONFIG, run.resolved)
            facts = _facts(run, begin)
            base = {"base": asdict(begin.folder.origin)}
            folder.write(store.PROVENANCE, provenance.describe() | facts | content | base)
            chat = begin.chat(run)
            tell_control(run, pools, data, suites, chat, screen.say)
            if run.finetune:
                check_mixture(run, data.train, pools, chat, lambda _: None)
            if run.force:  # the new run may not save, or measure, what the one before did
                for name in (store.MODEL, store.ADAPTER):
                    folder.remove(name)
                for pattern in ("drift*.json", store.COURSE):
                    folder.discard(pattern, keep=())
            try:
                with _levers(run):
                    stages.carry_through(Job(run, folder, begin, data, suites, facts, screen, provenance.StageMeter()))
            except Diverged:
                _forget(folder)  # nothing can go on from there
                raise
            _forget(folder)
        ability.check_made(run, folder)
        if folder.writes and run.export.push is not None:  # the run is finished, whatever the hub says
            push(run.export, folder.path / run.tuning.saved[0], screen.say)
    return folder


def _forget(folder: RunFolder) -> None:
    """Remove the checkpoints of a run."""
    for name in (store.CHECKPOINT, f"{store.CHECKPOINT}.old", store.GUARD):
        folder.remove(name)


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
            "tuning=lora or qlora, or null_space under the weight constraint",
            f"a smaller evaluation.batch_size ({run.evaluation.batch_size})",
            "several devices with trainer.strategy=fsdp",
        )
        raise LabError(f"out of memory ({str(error).splitlines()[0]}); less takes: {'; '.join(levers)}") from error


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
        anew = (HARMFULNESS, "suite_judges")  # today's judging may have none
        kept = {name: value for name, value in folder.read(store.METRICS).items() if name not in anew}
        record = {**kept, **judge(run, folder)}
        folder.write(store.METRICS, record)
        stages.write_card(run, folder, record)
    screen.result(title(record), record)
