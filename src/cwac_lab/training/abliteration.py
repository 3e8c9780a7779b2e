"""Abliteration: take the direction of refusal out of a model's weights (Arditi et al. 2024, arXiv 2406.11717).

``r`` is the difference of the mean residuals of harmful and of harmless prompts at their last token, after some layer,
at unit norm. Every matrix that writes to the residual stream, ``W`` of shape (D, d), becomes ``(I - r r^T) W``, and so
do the embeddings: no layer can write along r any more. A head that shares the embeddings' weights no longer reads r
either. The layer is the one whose direction leaves the least probability of refusals, among those that leave the
answers to harmless prompts as they were; where none does, the one that moves these least.

Fidelity: variant. The authors try every position after the instruction, here it is the last; they look at the inputs of
the layers below 0.8 of the depth, here at outputs from 0.2 to 0.8; they score log-odds, here it is a probability; they
leave out directions that induce no refusal when they are added, which is not tested here. The limit on what harmless
answers may move (0.1 nats) is theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cwac_lab.core.errors import LabError
from cwac_lab.data.attacks import LEAST
from cwac_lab.data.batches import pad
from cwac_lab.models.capture import layer_outputs
from cwac_lab.models.sites import decoder_layers, depth_to_layer, linears

# Relative depths of the layers whose directions are tried, and the most that answers to harmless prompts may move
# (KL in nats at their first token).
DEPTHS, MOST = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8), 0.1
Ids = Sequence[Sequence[int]]
# Norms of Gemma 2 and 3 and of OLMo2 that are behind a branch; the first is elsewhere the one before the FFN.
_AFTER = ("post_feedforward_layernorm",)


@dataclass(frozen=True)
class Tried:
    """What one direction does: the layer it is of, the probability of refusals that it leaves, and what it moves.

    Attributes:
        layer: Index of the layer.
        refusing: Probability of an opening of refusals, mean over harmful prompts.
        moved: KL from before at the first token of answers to harmless prompts, in nats.
    """

    layer: int
    refusing: float
    moved: float


def _last(ids: Ids, pad_id: int, device: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows, mask = pad(ids, pad_id)
    return rows.to(device), mask.to(device), mask.sum(1).to(device) - 1


@torch.no_grad()
def _means(model: Any, ids: Ids, layers: Sequence[int], pad_id: int) -> dict[int, Float[Tensor, " D"]]:
    """Return, by layer, the mean residual at the last token of some prompts."""
    rows, mask, last = _last(ids, pad_id, model.device)
    at = torch.arange(len(ids), device=model.device)
    found = layer_outputs(model, layers, rows, mask)
    return {layer: found[layer][at, last].float().mean(0) for layer in layers}


def directions(model: Any, harmful: Ids, harmless: Ids, pad_id: int) -> dict[int, Float[Tensor, " D"]]:
    """Return, by layer of ``DEPTHS``, the difference of means, of shape (D,) and unit norm.

    Args:
        model: The model, in evaluation mode.
        harmful: Harmful prompts as token ids.
        harmless: Harmless ones.
        pad_id: Id to pad with.
    """
    n_layers = len(decoder_layers(model))
    layers = sorted({depth_to_layer(depth, n_layers) for depth in DEPTHS})
    bad, good = (_means(model, ids, layers, pad_id) for ids in (harmful, harmless))
    return {layer: torch.nn.functional.normalize(bad[layer] - good[layer], dim=0) for layer in layers}


def _writers(model: Any) -> Iterator[Float[Tensor, "D *"]]:
    """Yield what writes to the residual stream, each turned so that its rows are the D coordinates of that."""
    yield model.get_input_embeddings().weight.T
    for matrix in linears(model, "all_linear"):
        if matrix.site.kind in ("attn_out", "ffn_out"):
            yield matrix.weight


@torch.no_grad()
def remove_(model: Any, direction: Float[Tensor, " D"]) -> None:
    """Take a direction of unit norm out of all that writes to the residual stream, in place.

    Raises:
        LabError: If a layer adds a bias, or scales what it writes by a norm's gains: it would write along it still.
    """
    if any(hasattr(layer, name) for layer in decoder_layers(model) for name in _AFTER):
        raise LabError("a norm stands behind attention or FFN (accepted by abliteration: norms before them alone)")
    for matrix in linears(model, "all_linear"):
        if matrix.site.kind in ("attn_out", "ffn_out") and getattr(matrix.module, "bias", None) is not None:
            raise LabError(f"{matrix.name} has a bias (accepted by abliteration: layers without)")
    for weight in _writers(model):
        r = direction.to(weight)
        weight.sub_(torch.outer(r, r @ weight))


@contextmanager
def _without(model: Any, direction: Float[Tensor, " D"]) -> Iterator[None]:
    held = [weight.detach().clone() for weight in _writers(model)]
    try:
        remove_(model, direction)
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(_writers(model), held, strict=True):
                weight.copy_(value)


@torch.no_grad()
def _first(model: Any, ids: Ids, pad_id: int) -> Float[Tensor, "N V"]:
    """Return the log-probabilities of the first token of answers."""
    rows, mask, last = _last(ids, pad_id, model.device)
    logits = model(input_ids=rows, attention_mask=mask, use_cache=False).logits
    return logits[torch.arange(len(ids), device=model.device), last].float().log_softmax(-1)


def abliterate(
    model: Any, harmful: Ids, harmless: Ids, openings: Sequence[int], pad_id: int
) -> tuple[Tried, list[Tried]]:
    """Take the direction of refusal out of a model, in place.

    Args:
        model: The model, in evaluation mode.
        harmful: Harmful prompts as token ids; the second half chooses the layer, the first half gives the directions.
        harmless: Harmless ones, likewise.
        openings: Ids of tokens that refusals begin with.
        pad_id: Id to pad with.

    Returns:
        What was taken out, and all that was tried.

    Raises:
        LabError: If there are fewer than ``LEAST`` prompts of a kind.
    """
    if min(len(harmful), len(harmless)) < LEAST:
        told = f"{len(harmful)} harmful and {len(harmless)} harmless prompts"
        raise LabError(f"abliteration: {told} (accepted: {LEAST} of each at least)")
    halves = {
        name: (ids[: len(ids) // 2], ids[len(ids) // 2 :]) for name, ids in (("bad", harmful), ("good", harmless))
    }
    found = directions(model, halves["bad"][0], halves["good"][0], pad_id)
    before, tried = _first(model, halves["good"][1], pad_id), []
    for layer, direction in found.items():
        with _without(model, direction):
            refusing = _first(model, halves["bad"][1], pad_id)[:, list(openings)].exp().sum(-1).mean()
            now = _first(model, halves["good"][1], pad_id)
        moved = (before.exp() * (before - now)).sum(-1).mean()
        tried.append(Tried(layer, float(refusing), float(moved)))
    gentle = [each for each in tried if each.moved <= MOST]
    chosen = min(gentle, key=lambda each: each.refusing) if gentle else min(tried, key=lambda each: each.moved)
    remove_(model, found[chosen.layer])
    return chosen, tried
