"""Step time of the constraints beside plain fine-tuning, on the same batches in one process.

``python -m cwac_lab.benchmarks.steps model=smollm`` prepares what is missing first, and evaluates nothing.
"""

from __future__ import annotations

import statistics
import time
from itertools import pairwise
from typing import Any

import lightning as L
from omegaconf import DictConfig

from cwac_lab import cli

# The first steps pay for memory that is touched for the first time; what is counted is a multiple of every period used.
WARM_UP, STEPS, ROUNDS = 3, 12, 2


class _Clock(L.Callback):
    """Notes the time at the end of every batch."""

    def __init__(self) -> None:
        self.ticks: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        """Note the time."""
        self.ticks.append(time.perf_counter())


def limit(model: Any, batch: Any) -> dict[str, float]:
    """Return what a plain step cannot do without: TFLOP, seconds at the speed of large products, gigabytes of AdamW.

    AdamW reads weight, gradient and two moments and writes all but the gradient, 4 bytes each.

    Args:
        model: The model, with what trains.
        batch: The rows of a step.
    """
    import torch
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
    import torch
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
    """Time plain fine-tuning, each part and the whole in turn, in rounds, so that a drift of the machine would show."""
    from cwac_lab.config import read
    from cwac_lab.data import mixing
    from cwac_lab.data.batches import collate
    from cwac_lab.defense import Composite
    from cwac_lab.models import adapters
    from cwac_lab.preparation import artefacts, start
    from cwac_lab.results.console import Screen
    from cwac_lab.training.loop import fit

    screen = Screen()
    steps: dict[str, list[float]] = {}
    timed = read(config)
    labels = list(dict.fromkeys(["none", *timed.constraint.parts, timed.constraint_name]))
    for turn in range(ROUNDS):
        for label in labels:
            run = read(config)
            alone = {name: Composite({name: part}) for name, part in run.constraint.parts.items()}
            defense = {"none": Composite(), **alone, run.constraint_name: run.constraint}[label]
            begin = start(run, screen.say)
            model, chat = begin.load(run)
            n = run.trainer.batch_size * (WARM_UP + STEPS)
            harmful = begin.pools.get("harmful", "finetune")
            rows = mixing.mix(
                begin.pools.task_rows(run.data, run.task).train, harmful, n, run.harmful_ratio, mixing="replace", seed=0
            )
            context, _ = artefacts(run, begin, model, chat, screen.say)
            adapters.attach(model, run.tuning, run.seed)
            defense.prepare(context)
            clock = _Clock()
            examples = [chat.encode(row.prompt, row.response) for row in rows]
            fit(model, examples, chat.pad_id, defense, run.trainer, 0, callbacks=[clock])
            taken = [later - earlier for earlier, later in pairwise(clock.ticks)][WARM_UP - 1 :]
            steps.setdefault(label, []).extend(taken)
            screen.say(f"round {turn + 1}, {label}: {statistics.mean(taken):.2f} s a step over {len(taken)} steps")
    batch = collate(examples[: run.trainer.batch_size], chat.pad_id)
    least = limit(begin.load(run)[0], batch)
    screen.say(
        f"a step of none: {least['tflop']:.2f} TFLOP, {least['seconds']:.2f} s at the {least['gflops']:.0f} GFLOP/s of "
        f"large products here; AdamW moves {least['adamw_gb']:.1f} GB"
    )
    shares = busiest(begin.load(run)[0], batch)
    screen.say("its time: " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items()))
    base = statistics.mean(steps["none"])
    for label, taken in steps.items():
        mean = statistics.mean(taken)
        screen.say(f"{label}: {mean:.2f} s a step, {mean / base:.2f} times none (n={len(taken)})")


if __name__ == "__main__":
    cli.launch(main)
