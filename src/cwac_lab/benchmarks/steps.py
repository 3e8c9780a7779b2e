"""Step time of the constraints beside plain fine-tuning, on the same batches, step by step in turn.

``python -m cwac_lab.benchmarks.steps model=smollm`` prepares what is missing first, and evaluates nothing. Every
constraint trains in a process of its own, all are in memory at once, and one at a time takes a step, so that a machine
that becomes slower does so for all of them. ``+benchmark.ways=[none,coupled]`` times some of them only.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from contextlib import suppress
from dataclasses import replace
from itertools import cycle, islice
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from omegaconf import DictConfig

from cwac_lab.benchmarks.timing import WARM_UP, split_off
from cwac_lab.core import cli
from cwac_lab.core.errors import LabError

if TYPE_CHECKING:
    from cwac_lab.config.run import Run
    from cwac_lab.models.chat import ChatFormat, Encoded
    from cwac_lab.run.start import Start

# A round is a multiple of the periods of restoring and of the reference pass (of the leak's, every tenth step, three
# rounds hold three for 3.6).
STEPS, ROUNDS = 12, 3


class _Turns(L.Callback):
    """Takes a step when told to, and reports how long it took, with what lies between it and the next."""

    def __init__(self, line: Connection) -> None:
        self._line, self._begun = line, 0.0

    def _report(self) -> None:
        if self._begun:
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            self._line.send(time.perf_counter() - self._begun)

    def on_train_batch_start(self, *_: Any) -> None:
        """Report the step before and wait for the next turn."""
        self._report()
        self._line.recv()
        self._begun = time.perf_counter()

    def on_train_end(self, *_: Any) -> None:
        """Report the last step."""
        self._report()


# What a label ends with where only what the constraint leaves free is trained, as factors.
FACTORS = ", tuning=null_space"


def labels(run: Run) -> list[str]:
    """Return what is timed: plain fine-tuning, each part, the whole, and the whole in factors where it can be."""
    from cwac_lab.config.checks import cross_check
    from cwac_lab.core.errors import ConfigError
    from cwac_lab.run.start import start

    found = ["none", *run.constraint.parts, run.constraint_name]
    if run.tuning.method == "full" and run.constraint.requirements.subspace is not None:
        label = run.constraint_name + FACTORS
        with suppress(ConfigError):  # a model may be no fit for them, of a mixture the experts
            cross_check(chosen(run, label))
            start(chosen(run, label), lambda _: None)
            found.append(label)
    return list(dict.fromkeys(found))


def chosen(run: Run, label: str) -> Run:
    """Return a run with what a label names: ``none``, a part of the run's constraint, or the whole."""
    from cwac_lab.defenses.interface import Composite

    name, tuning, constraint = label.removesuffix(FACTORS), run.tuning, run.constraint
    if name != run.constraint_name:
        constraint = Composite({} if name == "none" else {name: constraint.parts[name]})
    spec = constraint.requirements.subspace
    if name != label and spec is not None:
        tuning = replace(tuning, method="null_space", modules=spec.modules)
    elif tuning.method == "null_space" and spec is None:  # there is nothing that is left free
        tuning = replace(tuning, method="full", save="merged")
    return replace(run, tuning=tuning, constraint=constraint)


def mixture(run: Run, begin: Start, chat: ChatFormat) -> list[Encoded]:
    """Return the rows of a round."""
    from cwac_lab.data import mixing

    given, harmful = begin.pools.task_rows(run.data, run.task).train, begin.pools.get("harmful", "finetune")
    n = run.trainer.batch_size * STEPS
    rows = mixing.mix(given, harmful, n, run.harmful_ratio, mixing="replace", seed=0)
    return [chat.encode(row.prompt, row.response) for row in rows]


def _train(config: DictConfig, label: str, line: Connection, threads: int, steps: int) -> None:
    """Train with one constraint, in a process of its own."""
    from cwac_lab.config.run import read
    from cwac_lab.defenses.cwac.null_space import attach
    from cwac_lab.run.artefacts import artefacts
    from cwac_lab.run.start import start
    from cwac_lab.training.loop import fit

    torch.set_num_threads(threads)
    run = chosen(read(config), label)
    begin = start(run, lambda _: None)
    model, chat = begin.load(run)
    examples = list(islice(cycle(mixture(run, begin, chat)), run.trainer.batch_size * steps))
    context, _ = artefacts(run, begin, model, chat, lambda _: None)
    ids = [example.input_ids for example in examples]
    attach(model, run.tuning, run.seed, run.constraint.requirements.subspace, context.subspace, ids, chat.pad_id)
    run.constraint.prepare(context)
    trainer = replace(run.trainer, epochs=1, progress_bar=False)
    fit(model, examples, chat.pad_id, run.constraint, trainer, 0, callbacks=[_Turns(line)])


def in_turn(lines: dict[str, Any], steps: int) -> dict[str, list[float]]:
    """Return the seconds of every step of some processes that take steps in turn, the next one first each time.

    Args:
        lines: By label, what a process is told to go on by and what it reports to.
        steps: Steps of each.

    Raises:
        LabError: If one of them ended.
    """
    taken: dict[str, list[float]] = {label: [] for label in lines}
    order = list(lines)
    for step in range(steps):
        first = step % len(order)
        for label in order[first:] + order[:first]:
            try:
                lines[label].send(None)
                taken[label].append(lines[label].recv())
            except (EOFError, OSError):
                raise LabError(f"training with {label} ended at step {step + 1}; its message is above") from None
    return taken


def table(taken: dict[str, list[float]], period: int) -> str:
    """Return seconds a step, and times those of ``none`` in the same round: the median and range over rounds.

    Args:
        taken: Seconds of every step by label, as many for each.
        period: Steps of a round.
    """
    lines = ["| constraint | seconds a step | times none | rounds |", "| --- | --- | --- | --- |"]
    means = {
        label: [statistics.mean(seconds[at : at + period]) for at in range(0, len(seconds), period)]
        for label, seconds in taken.items()
    }
    for label, rounds in means.items():
        ratios = [mine / plain for mine, plain in zip(rounds, means["none"], strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(f"| {label} | {statistics.mean(rounds):.2f} (n={len(taken[label])}) | {spread} | {len(rounds)} |")
    return "\n".join(lines)


def limit(model: Any, batch: Any) -> dict[str, float]:
    """Return what a plain step cannot do without: TFLOP, seconds at the speed of large products, gigabytes of AdamW.

    AdamW reads weight, gradient and two moments and writes all but the gradient, 4 bytes each.

    Args:
        model: The model, with what trains.
        batch: The rows of a step.
    """
    from torch.utils.flop_counter import FlopCounterMode

    from cwac_lab.models.answers import answer_loss

    with FlopCounterMode(display=False) as counter:
        answer_loss(model, batch).backward()  # type: ignore[no-untyped-call]
    model.zero_grad(set_to_none=True)
    size, taken = 2048, []
    left, right = torch.randn(size, size), torch.randn(size, size)
    for _ in range(6):
        begin = time.perf_counter()
        left @ right
        taken.append(time.perf_counter() - begin)
    speed = 2 * size**3 / statistics.median(taken[1:])
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    flops = counter.get_total_flops()
    return {"tflop": flops / 1e12, "seconds": flops / speed, "gflops": speed / 1e9, "adamw_gb": 7 * 4 * trained / 1e9}


def busiest(model: Any, batch: Any, most: int = 6) -> dict[str, float]:
    """Return the operators that a plain step spends most time in, each with its share of forward, backward and AdamW.

    Args:
        model: The model, with what trains; its weights move by one step.
        batch: The rows of a step.
        most: How many operators.
    """
    from torch.profiler import ProfilerActivity, profile

    from cwac_lab.models.answers import answer_loss

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    for turn in range(2):  # the first touches memory for the first time
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            answer_loss(model, batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
        if turn:
            spent = {event.key: event.self_cpu_time_total for event in seen.key_averages()}
    total = sum(spent.values())
    return {name: spent[name] / total for name in sorted(spent, key=lambda name: -spent[name])[:most]}


def main(config: DictConfig) -> None:
    """Print the table for plain fine-tuning, each part and the whole; then what a plain step cannot do without."""
    from cwac_lab.config.run import read
    from cwac_lab.data.batches import collate
    from cwac_lab.report.console import Screen
    from cwac_lab.run.artefacts import artefacts
    from cwac_lab.run.start import start

    config, timing = split_off(config, STEPS, ROUNDS)
    screen, run = Screen(), read(config)
    ways = timing.only(labels(run))
    begin = start(run, screen.say)
    model, chat = begin.load(run)
    artefacts(run, begin, model, chat, screen.say)  # made once, before all processes ask for them
    context = multiprocessing.get_context("spawn")
    threads, steps = torch.get_num_threads(), WARM_UP + timing.rounds * timing.steps
    lines, processes = {}, []
    for label in ways:
        lines[label], theirs = context.Pipe()
        processes.append(context.Process(target=_train, args=(config, label, theirs, threads, steps), daemon=True))
        processes[-1].start()
        theirs.close()
    in_turn(lines, WARM_UP)
    print(table(in_turn(lines, timing.rounds * timing.steps), timing.steps))
    for process in processes:
        process.join()
    rows = mixture(run, begin, chat)
    tokens = sum(len(row.input_ids) for row in rows) / (len(rows) / run.trainer.batch_size)
    batch = collate(rows[: run.trainer.batch_size], chat.pad_id)
    least = limit(model, batch)
    screen.say(f"{tokens:.0f} tokens a step on average")
    screen.say(
        f"the first step of none: {least['tflop']:.2f} TFLOP, {least['seconds']:.2f} s at the {least['gflops']:.0f} "
        f"GFLOP/s of large products here; AdamW moves {least['adamw_gb']:.1f} GB"
    )
    shares = busiest(model, batch)
    screen.say("its time: " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items()))


if __name__ == "__main__":
    cli.launch(main)
