"""From training rows to padded tensors, and a plan of length-bucketed batches."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from cwac_lab.models.answers import Batch, Piece, to_device
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


def collate(examples: Sequence[Encoded], pad_id: int, index: int = 0, of: int = 1) -> Batch:
    """Return a batch of rows, or of part ``index`` of ``of`` of a step's rows (the first row where it has none)."""
    mine = examples[index::of]
    used = mine or examples[:1]
    ids, mask = pad([example.input_ids for example in used], pad_id)
    labels, _ = pad([example.labels for example in used], IGNORED)
    batch: Batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if of > 1:
        answers = sum(label != IGNORED for example in examples for label in example.labels[1:])
        tokens = sum(len(example.input_ids) for example in examples)
        counted = (answers / of, tokens / of) if mine else (math.inf, math.inf)
        batch["piece"] = Piece(index, of, len(examples), *counted)
    return batch


def cyclic(n: int, size: int, turn: int, seed: str) -> list[int]:
    """Return the rows that turn ``turn`` takes of ``n``, ``size`` at a time: every pass over them is shuffled anew."""
    rows = []
    for position in range(turn * size, (turn + 1) * size):
        order = list(range(n))
        random.Random(f"{seed}/{position // n}").shuffle(order)
        rows.append(order[position % n])
    return rows


def in_place_of(batch: Batch, examples: Sequence[Encoded], turn: int, seed: str, pad_id: int) -> Batch:
    """Return the rows that turn ``turn`` takes of some, as many as a step's batch has, or its piece of them.

    Args:
        batch: The batch whose place they take, and whose device.
        examples: Rows to take, ``cyclic``.
        turn: Number of the turn.
        seed: Of the order.
        pad_id: Id to pad with.
    """
    size, *piece = (batch["piece"].rows, *batch["piece"][:2]) if "piece" in batch else (len(batch["input_ids"]),)
    rows = cyclic(len(examples), size, turn, seed)
    return to_device(collate([examples[row] for row in rows], pad_id, *piece), batch["input_ids"].device)


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
