"""Run what is missing of a list of runs; one that fails does not stop the others."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context, parent_process
from multiprocessing.context import BaseContext
from pathlib import Path
from threading import Thread

from cwac_lab.config.run import Run, read
from cwac_lab.core.cache import digest
from cwac_lab.core.cli import compose
from cwac_lab.core.memory import give_back
from cwac_lab.core.progress import Meter, duration
from cwac_lab.report.console import Screen
from cwac_lab.run import asked
from cwac_lab.run.identity import folder_of, identity
from cwac_lab.sweep.cells import Cells

Overrides = tuple[str, ...]


def _words(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


@dataclass(frozen=True)
class Outcome:
    """What became of one run.

    Attributes:
        overrides: The run.
        status: ``ok``, ``failed``, or ``running`` (another process is on it).
        reason: Why it failed.
        seconds: How long it took here.
        path: Its folder, where it came so far as to have one.
    """

    overrides: Overrides
    status: str
    reason: str = ""
    seconds: float = 0.0
    path: Path | None = None


def composed(overrides: Overrides) -> Run:
    """Return the checked configuration of a run."""
    return read(compose(overrides))


def attempt(overrides: Overrides, screen: Screen) -> Outcome:
    """Carry one run out; whatever it raises becomes its outcome."""
    from cwac_lab.run.execution import carry_out  # Lightning, which nothing needs where no run is missing

    begin, path = time.perf_counter(), None
    try:
        run = composed(overrides)
        path = folder_of(run, identity(run, screen.say)).path
        folder = carry_out(run, overrides, screen)
    except Exception as error:  # noqa: BLE001 - a sweep reports whatever a cell fails with, and goes on
        return Outcome(overrides, "failed", _words(error), time.perf_counter() - begin, path)
    return Outcome(overrides, folder.status, "", time.perf_counter() - begin, folder.path)


def _alone(overrides: Overrides, screen: Screen) -> Outcome:
    """Make a run, and give back what it held, which ``attempt`` has let go of by then."""
    try:
        return attempt(overrides, screen)
    finally:
        give_back()


def _work(overrides: Overrides) -> Outcome:
    return _alone(overrides, Screen(quiet=True))


def _end_with_parent() -> None:
    """End this process where the sweep's ends, however that does; its run is then taken for interrupted.

    Ctrl-C reaches workers too. A signal to the sweep alone would leave them, with runs that nobody waits for.
    """
    if (parent := parent_process()) is not None:
        parent.join()
        os._exit(1)


def _prepare_worker(threads: int, environment: dict[str, str]) -> None:
    import torch

    Thread(target=_end_with_parent, daemon=True).start()

    os.environ.clear()  # what it is forked off may be older than a variable
    os.environ.update(environment)
    torch.set_num_threads(threads)


def outcomes(runs: Sequence[Overrides], jobs: int, screen: Screen) -> Iterator[Outcome]:
    """Yield the outcome of every run as it ends.

    Args:
        runs: What to run.
        jobs: Processes; 1 runs everything in this one.
        screen: Where a run in this process reports.
    """
    if jobs == 1:
        for overrides in runs:
            yield _alone(overrides, screen)
        return
    left = list(runs)
    while left:
        lost = yield from _pooled(left, jobs)
        if jobs == 1 and lost:  # one worker takes them in order, so the first that is lost killed it
            yield Outcome(lost[0], "failed", "its process was killed (out of memory?)")
            lost = lost[1:]
        left, jobs = lost, 1


def _fresh() -> BaseContext:
    """Return what starts workers that share no state: where that is safe, forked off a process that has only imported.

    Imports may ask for a GPU, after which CUDA does not start in a fork; on macOS libraries do not survive one.
    """
    import torch

    if sys.platform != "linux" or torch.accelerator.is_available():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(["cwac_lab.run.execution"])
    return context


def _pooled(runs: Sequence[Overrides], jobs: int) -> Generator[Outcome, None, list[Overrides]]:
    """Yield outcomes from a pool of processes; returns, in order, the runs that were lost when a process died."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    lost = []
    with ProcessPoolExecutor(jobs, _fresh(), _prepare_worker, (threads, dict(os.environ))) as pool:
        waiting = {pool.submit(_work, overrides): overrides for overrides in runs}
        for done in as_completed(waiting):
            try:
                yield done.result()
            except BrokenExecutor:  # this also ends all that wait
                lost.append(waiting[done])
    return sorted(lost, key=list(runs).index)


def _waves(missing: dict[Path, dict[str, list[Overrides]]]) -> Iterator[list[list[Overrides]]]:
    """Yield what is carried out side by side; cells of one run that ask for different things come one after another."""
    left = [list(groups.values()) for groups in missing.values()]
    while left:
        yield [groups[0] for groups in left]
        left = [groups[1:] for groups in left if groups[1:]]


def sweep(
    runs: Sequence[Overrides], jobs: int, screen: Screen, say: Callable[[str], None], cells: Cells
) -> Iterator[Outcome]:
    """Run what is missing, tell how far it is, and yield an outcome for each of ``runs``: first of those recorded.

    A finished run that is asked more than when it was made is measured again, and not trained.
    """
    found: list[Outcome] = []
    missing: dict[Path, dict[str, list[Overrides]]] = {}  # cells that come to the same run, by what they ask for
    remember: dict[Overrides, Callable[[], None]] = {}
    more: set[Path] = set()
    for overrides in runs:
        try:
            recorded = cells.finished(overrides)
            if recorded is not None:
                found.append(Outcome(overrides, "ok", path=recorded))
                continue
            run = composed(overrides)
            content = identity(run, screen.say)
            folder = folder_of(run, content)
            remember[overrides] = partial(cells.add, overrides, run, content, folder.path)
            done = folder.status == "ok" and not run.force
            if done and not asked.answered(asked.asks(run.resolved), folder):
                done, more = False, more | {folder.path}
        except Exception as error:  # noqa: BLE001 - likewise
            found.append(Outcome(overrides, "failed", _words(error)))
            continue
        if done:
            remember[overrides]()
            found.append(Outcome(overrides, "ok", path=folder.path))
        else:
            missing.setdefault(folder.path, {}).setdefault(digest(asked.asks(run.resolved)), []).append(overrides)
    cells.save()
    already = {outcome.path for outcome in found if outcome.status == "ok"} - missing.keys()
    failed = sum(outcome.status == "failed" for outcome in found)
    told = f", {len(more)} asked for more" if more else ""
    say(f"{len(already) + failed + len(missing)} runs, {len(already)} recorded already{told}")
    yield from found
    try:
        for outcome in _carried_out(missing, jobs, screen, say):
            if outcome.status == "ok":
                remember[outcome.overrides]()
            yield outcome
    finally:
        cells.save()


def _carried_out(
    missing: dict[Path, dict[str, list[Overrides]]], jobs: int, screen: Screen, say: Callable[[str], None]
) -> Iterator[Outcome]:
    """Yield an outcome for each cell, and tell how far it is."""
    begin, number, total = time.perf_counter(), 0, sum(map(len, missing.values()))
    # A run in this process tells how far it is by itself.
    with Meter("runs", total) if jobs > 1 and total else nullcontext() as meter:
        for wave in _waves(missing):
            alike = {cells[0]: cells for cells in wave}
            for outcome in outcomes(list(alike), jobs, screen):
                number += 1
                left = (time.perf_counter() - begin) / number * (total - number)
                told = f"{outcome.status} in {outcome.seconds:.0f} s: {' '.join(outcome.overrides)}"
                say(f"[{number}/{total}] {told} (about {duration(left)} left)")
                if meter is not None:
                    meter.advance()
                yield from (replace(outcome, overrides=overrides) for overrides in alike[outcome.overrides])
