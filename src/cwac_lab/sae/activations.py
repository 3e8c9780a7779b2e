"""Collect residual-stream activations of the aligned model for an autoencoder."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from cwac_lab.data.batches import pad
from cwac_lab.models.capture import layer_outputs, without_sinks


@torch.no_grad()
def collect(
    model: object, layer: int, conversations: Sequence[Sequence[int]], pad_id: int, batch_size: int = 16
) -> Float[Tensor, "N D"]:
    """Return the activations after a layer at all tokens of some conversations, without sink tokens.

    Args:
        model: The aligned model, in evaluation mode.
        layer: Index of the decoder layer.
        conversations: Token ids.
        pad_id: Id to pad with.
        batch_size: Conversations per forward.

    Returns:
        Activations of shape (N, D) in float32 on the CPU.
    """
    rows = []
    ordered = sorted(conversations, key=len)
    for begin in range(0, len(ordered), batch_size):
        ids, mask = pad(ordered[begin : begin + batch_size], pad_id)
        device = model.device  # type: ignore[attr-defined]
        ids, mask = ids.to(device), mask.to(device)
        x = layer_outputs(model, [layer], ids, mask)[layer]
        rows.append(x[without_sinks(x, mask)].float().cpu())
    return torch.cat(rows)


def blend(
    harmful: Sequence[Sequence[int]], benign: Sequence[Sequence[int]], n_tokens: int, share: float, seed: int
) -> list[Sequence[int]]:
    """Draw conversations until both kinds reach their part of ``n_tokens``, or are used up.

    Args:
        harmful: Harmful prompts with refusals, as token ids.
        benign: Benign conversations, as token ids.
        n_tokens: Tokens wanted in total.
        share: Share of harmful tokens, in [0, 1].
        seed: Seed of the draw.
    """
    chosen: list[Sequence[int]] = []
    for kind, part in ((harmful, share), (benign, 1 - share)):
        held = 0
        for conversation in random.Random(f"sae/{seed}").sample(kind, len(kind)):
            if held >= round(part * n_tokens):
                break
            chosen.append(conversation)
            held += len(conversation)
    return chosen
