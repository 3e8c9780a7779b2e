"""From training rows to padded tensors: a plan of length-bucketed batches, and the Lightning data module."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import DataLoader

from cwac_lab.models.chat import IGNORED, Encoded

BUCKET_BATCHES = 16


def pad(
    sequences: Sequence[Sequence[int]], fill: int, *, left: bool = False
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Pad sequences to one length.

    Returns:
        The ids of shape (B, T), and a mask of the same shape that is 1 on real tokens.
    """
    width = max(len(sequence) for sequence in sequences)
    ids = torch.full((len(sequences), width), fill)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        span = slice(width - len(sequence), width) if left else slice(0, len(sequence))
        ids[row, span] = torch.tensor(sequence)
        mask[row, span] = 1
    return ids, mask


def collate(examples: Sequence[Encoded], pad_id: int) -> dict[str, Int[Tensor, "B T"]]:
    """Return ``input_ids``, ``attention_mask`` and ``labels``, each of shape (B, T), right-padded."""
    ids, mask = pad([example.input_ids for example in examples], pad_id)
    labels, _ = pad([example.labels for example in examples], IGNORED)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def cyclic(n: int, size: int, turn: int, seed: str) -> list[int]:
    """Return the rows that turn ``turn`` takes of ``n``, ``size`` at a time: every pass over them is shuffled anew."""
    rows = []
    for position in range(turn * size, (turn + 1) * size):
        order = list(range(n))
        random.Random(f"{seed}/{position // n}").shuffle(order)
        rows.append(order[position % n])
    return rows


def plan_batches(lengths: Sequence[int], batch_size: int, epochs: int, seed: int) -> list[list[int]]:
    """Return the batches of all epochs as lists of row numbers.

    Each epoch is shuffled, cut into buckets of ``BUCKET_BATCHES`` batches, sorted by length within a bucket so that
    little is padded, and its batches are shuffled again. Every row occurs once an epoch; the last batch may be short.
    """
    plan: list[list[int]] = []
    for epoch in range(epochs):
        source = random.Random(f"batches/{seed}/{epoch}")
        order = list(range(len(lengths)))
        source.shuffle(order)
        batches = []
        for begin in range(0, len(order), batch_size * BUCKET_BATCHES):
            bucket = sorted(order[begin : begin + batch_size * BUCKET_BATCHES], key=lambda row: lengths[row])
            batches += [bucket[i : i + batch_size] for i in range(0, len(bucket), batch_size)]
        source.shuffle(batches)
        plan += batches
    return plan


class TrainData(L.LightningDataModule):
    """Serves a fixed plan of batches from a given step on, so that a resumed run sees exactly the batches left."""

    def __init__(
        self, examples: Sequence[Encoded], pad_id: int, batch_size: int, epochs: int, seed: int, first_step: int = 0
    ) -> None:
        """Plan all epochs; ``first_step`` batches are skipped."""
        super().__init__()
        self.examples, self.pad_id = examples, pad_id
        self.plan = plan_batches([len(e.input_ids) for e in examples], batch_size, epochs, seed)
        self.first_step = first_step

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the loader over the batches that are left."""
        return DataLoader(
            self.examples,  # type: ignore[arg-type]
            batch_sampler=self.plan[self.first_step :],
            collate_fn=lambda rows: collate(rows, self.pad_id),
        )
