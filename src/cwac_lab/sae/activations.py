"""Collect residual-stream activations of the aligned model for an autoencoder."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cwac_lab import distributed
from cwac_lab.data.batches import pad
from cwac_lab.models.capture import layer_outputs, without_sinks


@torch.no_grad()
def collect(
    model: Any,
    layer: int,
    conversations: Sequence[Sequence[int]],
    pad_id: int,
    *,
    unlike: Sequence[Sequence[int]] = (),
    batch_size: int = 16,
) -> Float[Tensor, "N D"]:
    """Return the activations after a layer at all tokens of some conversations, without sink tokens.

    In a causal model a token's activation is a function of the tokens up to it, so conversations that open alike (chat
    templates do) share activations exactly: ``unlike`` leaves those out.

    Args:
        model: The aligned model, in evaluation mode.
        layer: Index of the decoder layer.
        conversations: Token ids.
        pad_id: Id to pad with.
        unlike: Conversations; tokens whose whole context opens one of them are left out.
        batch_size: Conversations per forward.

    Returns:
        Activations of shape (N, D) in float32 on the CPU.
    """
    seen = {tuple(other[: end + 1]) for other in unlike for end in range(len(other))}
    ordered = sorted(conversations, key=len)

    def forward(batch: Sequence[Sequence[int]]) -> Float[Tensor, "N D"]:
        ids, mask = pad(batch, pad_id)
        ids, mask = ids.to(model.device), mask.to(model.device)
        x = layer_outputs(model, [layer], ids, mask)[layer]
        keep = without_sinks(x, mask)
        for place, tokens in enumerate(batch if seen else ()):
            for end in range(len(tokens)):
                if tuple(tokens[: end + 1]) in seen:
                    keep[place, end] = False
        return x[keep].float().cpu()

    batches = [ordered[begin : begin + batch_size] for begin in range(0, len(ordered), batch_size)]
    return torch.cat(distributed.spread(batches, lambda part: [forward(batch) for batch in part]))


def split(
    conversations: Sequence[Sequence[int]], held_out: float, seed: int
) -> tuple[list[Sequence[int]], list[Sequence[int]]]:
    """Return conversations to train on and a share ``held_out`` of them to measure quality on, at least one."""
    shuffled = random.Random(f"split/{seed}").sample(conversations, len(conversations))
    n_held = max(1, round(held_out * len(shuffled)))
    return shuffled[n_held:], shuffled[:n_held]


def blend(
    harmful: Sequence[Sequence[int]], benign: Sequence[Sequence[int]], n_tokens: int, share: float, seed: int
) -> list[Sequence[int]]:
    """Draw conversations until both kinds reach their part of ``n_tokens``; a kind that is used up shrinks the total.

    Args:
        harmful: Harmful prompts with refusals, as token ids.
        benign: Benign conversations, as token ids.
        n_tokens: Tokens wanted in total.
        share: Share of harmful tokens, in [0, 1].
        seed: Seed of the draw.
    """
    for kind, part in ((harmful, share), (benign, 1 - share)):
        if part > 0:
            n_tokens = min(n_tokens, round(sum(map(len, kind)) / part))
    chosen: list[Sequence[int]] = []
    for kind, part in ((harmful, share), (benign, 1 - share)):
        held = 0
        for conversation in random.Random(f"sae/{seed}").sample(kind, len(kind)):
            if held >= round(part * n_tokens):
                break
            chosen.append(conversation)
            held += len(conversation)
    return chosen
