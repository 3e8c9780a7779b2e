"""Collect residual-stream activations of the aligned model for an autoencoder."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cwac_lab.core import distributed
from cwac_lab.core.errors import QualityError
from cwac_lab.core.progress import track
from cwac_lab.data.batches import pad
from cwac_lab.models.capture import layer_outputs, without_sinks


class Contexts:
    """The openings of conversations met so far, as a tree of tokens.

    In a causal model a token's activation is a function of the tokens up to it, its context. So conversations that open
    alike, as those of one chat template do, share activations exactly.
    """

    def __init__(self, conversations: Iterable[Sequence[int]] = ()) -> None:
        """Meet some conversations, as token ids."""
        self._nodes: dict[tuple[int, int], int] = {}
        for tokens in conversations:
            self.meet(tokens)

    def meet(self, tokens: Sequence[int]) -> list[bool]:
        """Return which tokens of a conversation have a context that is new, and remember it."""
        node, new = 0, []
        for token in tokens:
            new.append((node, token) not in self._nodes)
            node = self._nodes.setdefault((node, token), len(self._nodes) + 1)
        return new


def copies(conversations: Sequence[Sequence[int]]) -> float:
    """Return the share of tokens whose context another conversation has too and which are counted there, in [0, 1)."""
    contexts = Contexts()
    new = [is_new for tokens in conversations for is_new in contexts.meet(tokens)]
    return 1 - sum(new) / len(new)


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
    """Return the activations after a layer at the tokens of some conversations, each context once, without sink tokens.

    Args:
        model: The aligned model, in evaluation mode.
        layer: Index of the decoder layer.
        conversations: Token ids.
        pad_id: Id to pad with.
        unlike: Conversations whose contexts are left out as well.
        batch_size: Conversations per forward.

    Returns:
        Activations of shape (N, D) in float32 on the CPU.

    Raises:
        QualityError: If no context is left.
    """
    contexts = Contexts(unlike)
    met = [(tokens, torch.tensor(contexts.meet(tokens))) for tokens in sorted(conversations, key=len)]
    met = [(tokens, new) for tokens, new in met if new.any()]
    if not met:
        raise QualityError("no tokens are left for the autoencoder; accepted: a larger sae.n_tokens, or more texts")

    def forward(batch: Sequence[tuple[Sequence[int], Tensor]]) -> Float[Tensor, "N D"]:
        ids, mask = pad([tokens for tokens, _ in batch], pad_id)
        ids, mask = ids.to(model.device), mask.to(model.device)
        x = layer_outputs(model, [layer], ids, mask)[layer]
        keep = without_sinks(x, mask) & pad_sequence([new for _, new in batch], batch_first=True).to(x.device)
        return x[keep].float().cpu()

    words = f"collecting activations of layer {layer}, batches"
    batches = [met[begin : begin + batch_size] for begin in range(0, len(met), batch_size)]
    return torch.cat(distributed.spread(batches, lambda part: [forward(batch) for batch in track(part, words)]))


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

    Tokens are counted whose context was not drawn before; a conversation without any is left out.

    Args:
        harmful: Harmful prompts with refusals, as token ids.
        benign: Benign conversations, as token ids.
        n_tokens: Tokens wanted in total.
        share: Share of harmful tokens, in [0, 1].
        seed: Seed of the draw.
    """
    for kind, part in ((harmful, share), (benign, 1 - share)):
        contexts = Contexts()
        if part > 0:
            n_tokens = min(n_tokens, round(sum(sum(contexts.meet(tokens)) for tokens in kind) / part))
    chosen: list[Sequence[int]] = []
    contexts = Contexts()
    for kind, part in ((harmful, share), (benign, 1 - share)):
        held = 0
        for conversation in random.Random(f"sae/{seed}").sample(kind, len(kind)):
            if held >= round(part * n_tokens):
                break
            new = sum(contexts.meet(conversation))
            held += new
            if new:
                chosen.append(conversation)
    return chosen
