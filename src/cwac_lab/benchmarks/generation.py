"""Throughput of evaluation's answers: batches that share their opening, beside one prompt at a time.

``python -m cwac_lab.benchmarks.generation model=smollm`` asks the start model the first harmful prompts and task rows
of the validation split, in rounds, and checks that all ways answer alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

from omegaconf import DictConfig

from cwac_lab.core import cli

PROMPTS, ROUNDS = 32, 3
SIZES = (1, 8, 32, 64)


def compare(
    ask: Callable[[int], list[str]], sizes: Sequence[int], rounds: int
) -> tuple[dict[int, float], dict[int, int]]:
    """Return, by batch size, the median seconds over the rounds, and how many answers differ from the first size's."""
    taken: dict[int, list[float]] = {size: [] for size in sizes}
    given: dict[int, list[str]] = {}
    for _ in range(rounds):
        for size in sizes:
            begin = time.perf_counter()
            given[size] = ask(size)
            taken[size].append(time.perf_counter() - begin)
    first = given[sizes[0]]
    unlike = {size: sum(a != b for a, b in zip(first, given[size], strict=True)) for size in sizes}
    return {size: statistics.median(seconds) for size, seconds in taken.items()}, unlike


def table(kind: str, n: int, seconds: dict[int, float], unlike: dict[int, int]) -> str:
    """Return the rows of a kind of prompts as Markdown."""
    base = next(iter(seconds.values()))
    return "\n".join(
        f"| {kind} | {size} | {n / taken:.2f} | {base / taken:.2f} | {unlike[size]} of {n} |"
        for size, taken in seconds.items()
    )


def main(config: DictConfig) -> None:
    """Print prompts per second by batch size."""
    from cwac_lab.config.run import read
    from cwac_lab.evaluation.generate import generate
    from cwac_lab.evaluation.protocol import evaluation_rows
    from cwac_lab.report.console import Screen
    from cwac_lab.run.start import start

    screen, run = Screen(), read(config)
    run.evaluation.split = "validation"
    begin = start(run, screen.say)
    model, chat = begin.load(run)
    rows = evaluation_rows(run, begin.pools, begin.pools.task_rows(run.data, run.task))
    print(f"{begin.folder.description}, {PROMPTS} prompts of a kind at most, {ROUNDS} rounds\n")
    print("| prompts | batch size | prompts/s | times batch size 1 | unlike its answers |")
    print("| --- | --- | --- | --- | --- |")
    for kind, longest in (("harmful", run.evaluation.max_new_tokens), ("task", run.task.max_new_tokens)):
        asked = [row["prompt"] for row in rows[kind][:PROMPTS]]
        seconds, unlike = compare(partial(generate, model, chat, asked, longest), SIZES, ROUNDS)
        print(table(kind, len(asked), seconds, unlike))


if __name__ == "__main__":
    cli.launch(main)
