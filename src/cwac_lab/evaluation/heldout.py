"""Loss on held-out answers: what fine-tuning bought where no rule can score an answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from cwac_lab.core.progress import track
from cwac_lab.core.stats import Rate, mean_per
from cwac_lab.data.batches import collate
from cwac_lab.models.answers import answer_logits, to_device
from cwac_lab.models.chat import ChatFormat, Encoded, Prompt

# Tokens of a forward at most (of more than one example), so that the logits of a large vocabulary fit into memory.
TOKENS = 2048
# The cross-entropy of a text's tokens in nats, summed, and their number.
Loss = tuple[float, int]


def losses(model: Any, chat: ChatFormat, rows: Sequence[tuple[Prompt, str]], batch_size: int) -> list[Loss]:
    """Return for each prompt and answer the loss of the answer's tokens.

    The end of turn is one of them. A row that is too long is cut as in training.

    Args:
        model: A causal language model.
        chat: Its chat format.
        rows: What is asked, and the answer that is held out.
        batch_size: Rows per forward.
    """
    examples = [chat.encode(asked, answer) for asked, answer in rows]
    return summed(model, examples, chat.pad_id, batch_size, "loss on held-out answers, batches")


@torch.inference_mode()
def summed(model: Any, examples: Sequence[Encoded], pad_id: int, batch_size: int, told: str) -> list[Loss]:
    """Return the loss of each example at the tokens that its labels say.

    Args:
        model: A causal language model.
        examples: Token ids and labels.
        pad_id: Id to pad with.
        batch_size: Examples per forward at most, and no more than fit into ``TOKENS``; they are of similar length.
        told: What is counted, for who waits.
    """
    found = [(0.0, 0)] * len(examples)
    for part in track(_parts([len(example.input_ids) for example in examples], batch_size), told):
        for place, loss in zip(part, _sums(model, [examples[place] for place in part], pad_id), strict=True):
            found[place] = loss
    return found


def _parts(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Return the places of examples, forward by forward, the short ones first."""
    parts: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not parts or len(parts[-1]) == batch_size or (len(parts[-1]) + 1) * lengths[place] > TOKENS:
            parts.append([])
        parts[-1].append(place)
    return parts


def _sums(model: Any, examples: list[Encoded], pad_id: int) -> list[Loss]:
    batch = to_device(collate(examples, pad_id), model.device)
    logits, targets = answer_logits(model, batch)
    counts = [sum(label >= 0 for label in example.labels[1:]) for example in examples]
    by_row = torch.split(cross_entropy(logits.float(), targets, reduction="none"), counts)
    return [(float(loss.double().sum()), count) for loss, count in zip(by_row, counts, strict=True)]


def mean_loss(generations: Iterable[dict[str, Any]]) -> Rate | None:
    """Return the mean loss per answer token over saved rows, in nats, with its interval over rows.

    None where no row has a loss.
    """
    rows = [row["loss"] for row in generations if "loss" in row]
    return mean_per([total for total, _ in rows], [count for _, count in rows]) if rows else None
