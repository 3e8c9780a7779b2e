"""Throughput and memory of plain fine-tuning beside Hugging Face's ``Trainer`` and TRL's ``SFTTrainer``.

``python -m cwac_lab.benchmarks.trainers model=smollm`` trains the same model on the same rows, batch and precision,
each trainer in a process of its own, in turn and in rounds. TRL comes with ``pip install 'cwac-lab[benchmark]'``.
``'+benchmark.ways=["SFTTrainer, packed"]'`` times some of them only.
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig

from cwac_lab.benchmarks.timing import WARM_UP, split_off
from cwac_lab.core import cli
from cwac_lab.core.errors import LabError

STEPS, ROUNDS = 12, 2
# What is asked of the others beyond their defaults; rows of similar length together is what this project does as well.
GROUPED = {"train_sampling_strategy": "group_by_length"}
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "cwac-lab": ("own", {}),
    "Trainer": ("Trainer", {}),
    "Trainer, rows by length": ("Trainer", GROUPED),
    "SFTTrainer": ("SFTTrainer", {}),
    "SFTTrainer, rows by length": ("SFTTrainer", GROUPED),
    "SFTTrainer, rows by length, chunked loss": ("SFTTrainer", {**GROUPED, "loss_type": "chunked_nll"}),
    "SFTTrainer, packed": ("SFTTrainer", {"packing": True}),
}


class Measured(NamedTuple):
    """Real tokens trained on per second, and the peak memory of the process in gigabytes."""

    tokens_per_second: float
    peak_gb: float


class _Rows(NamedTuple):
    """What every trainer is given."""

    folder: str
    ids: list[list[int]]
    labels: list[list[int]]
    pad_id: int
    trainer: dict[str, Any]


def _own(rows: _Rows) -> list[float]:
    import lightning as L

    from cwac_lab.defenses.interface import Composite
    from cwac_lab.models.chat import Encoded
    from cwac_lab.models.loading import load_model
    from cwac_lab.training.loop import fit
    from cwac_lab.training.settings import TrainerConfig

    ticks: list[float] = []

    class Clock(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            ticks.append(time.perf_counter())

    config = TrainerConfig(**rows.trainer)
    examples = [Encoded(ids, labels) for ids, labels in zip(rows.ids, rows.labels, strict=True)]
    model = load_model(Path(rows.folder), config.dtype, config.device)
    fit(model, examples, rows.pad_id, Composite(), config, 0, callbacks=[Clock()])
    return ticks


def _sft(rows: _Rows, model: Any, tokenizer: Any, common: dict[str, Any], callbacks: list[Any]) -> Any:
    """Return TRL's trainer; packed, a step has one row of as many tokens as the steps of the others."""
    import datasets
    from trl import SFTConfig, SFTTrainer

    answers = [[int(label >= 0) for label in labels] for labels in rows.labels]
    table = datasets.Dataset.from_dict({"input_ids": rows.ids, "completion_mask": answers})
    longest = rows.trainer["max_length"]
    if common.get("packing"):
        steps = len(rows.ids) // rows.trainer["batch_size"]
        common = common | {"per_device_train_batch_size": 1}
        longest = max(*map(len, rows.ids), -(-sum(map(len, rows.ids)) // steps))
    arguments = SFTConfig(**common, max_length=longest, completion_only_loss=True, gradient_checkpointing=False)
    return SFTTrainer(model, arguments, train_dataset=table, processing_class=tokenizer, callbacks=callbacks)


def _others(rows: _Rows, kind: str, more: dict[str, Any]) -> list[float]:
    import tempfile

    import datasets
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    datasets.disable_progress_bars()
    ticks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ticks.append(time.perf_counter())

    settings = rows.trainer
    model = AutoModelForCausalLM.from_pretrained(rows.folder, dtype="float32", trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(rows.folder, trust_remote_code=False)
    common = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": settings["batch_size"],
        "num_train_epochs": 1,
        "learning_rate": settings["learning_rate"],
        "lr_scheduler_type": "linear",
        "weight_decay": settings["weight_decay"],
        "max_grad_norm": settings["gradient_clip"],
        "optim": "adamw_torch_fused",
        "use_cpu": settings["accelerator"] == "cpu",
        "bf16": settings["precision"] == "bf16-mixed",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "seed": 0,
        **more,
    }
    trainer: Any
    if kind == "SFTTrainer":
        trainer = _sft(rows, model, tokenizer, common, [Clock()])
    else:
        ones = [[1] * len(ids) for ids in rows.ids]
        table = datasets.Dataset.from_dict({"input_ids": rows.ids, "attention_mask": ones, "labels": rows.labels})
        collator = DataCollatorForSeq2Seq(tokenizer, padding=True)
        trainer = Trainer(
            model, TrainingArguments(**common), train_dataset=table, data_collator=collator, callbacks=[Clock()]
        )
    trainer.train()
    return ticks


def _measure(way: str, rows: _Rows, threads: int) -> Measured:
    import torch

    torch.set_num_threads(threads)
    kind, more = WAYS[way]
    ticks = _own(rows) if kind == "own" else _others(rows, kind, more)
    if len(ticks) <= WARM_UP:
        raise LabError(f"{way}: {len(ticks)} steps, of which the first {WARM_UP} are not timed: more benchmark.steps")
    per_step = sum(map(len, rows.ids)) / len(ticks)
    return Measured(
        per_step * (len(ticks) - WARM_UP) / (ticks[-1] - ticks[WARM_UP - 1]),
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    )


def compare(rows: _Rows, threads: int, rounds: int, ways: Sequence[str] = tuple(WAYS)) -> dict[str, list[Measured]]:
    """Return what every trainer reached, round by round."""
    found: dict[str, list[Measured]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found[way].append(pool.apply(_measure, (way, rows, threads)))
    return found


def table(found: dict[str, list[Measured]]) -> str:
    """Return medians over the rounds, and their ratio to this project's, as Markdown."""
    lines = ["| trainer | tokens/s | cwac-lab is times as fast | peak GB | rounds |", "| --- | --- | --- | --- | --- |"]
    medians = {way: statistics.median(each.tokens_per_second for each in rounds) for way, rounds in found.items()}
    for way, rounds in found.items():
        peak = statistics.median(each.peak_gb for each in rounds)
        ratio = medians["cwac-lab"] / medians[way]
        lines.append(f"| {way} | {medians[way]:.0f} | {ratio:.2f} | {peak:.2f} | {len(rounds)} |")
    return "\n".join(lines)


def main(config: DictConfig) -> None:
    """Print the table for the rows of a task, without harmful ones."""
    import torch

    from cwac_lab.config.run import read
    from cwac_lab.report.console import Screen
    from cwac_lab.run.start import start

    config, timing = split_off(config, STEPS, ROUNDS)
    ways = timing.only(list(WAYS))
    screen, run = Screen(), read(config)
    begin = start(run, screen.say)
    _, chat = begin.load(run)
    wanted = run.trainer.batch_size * (WARM_UP + timing.steps)
    given = begin.pools.task_rows(run.data, run.task).train
    rows = [chat.encode(row.prompt, row.response) for row in (given * (wanted // len(given) + 1))[:wanted]]
    settings = asdict(run.trainer) | {"epochs": 1, "progress_bar": False}
    ids, labels = [row.input_ids for row in rows], [row.labels for row in rows]
    shared = _Rows(str(begin.folder.path), ids, labels, chat.pad_id, settings)
    screen.say(f"{begin.folder.description}: {wanted} rows of {run.task.name}, {sum(map(len, ids))} tokens")
    print(table(compare(shared, torch.get_num_threads(), timing.rounds, ways)))


if __name__ == "__main__":
    cli.launch(main)
