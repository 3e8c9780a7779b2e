"""What moved in the residual stream and in the first words of answers: refusal direction, latents, distributions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity, kl_div

from cwac_lab.defenses.cwac.sae.latents import LayerFeatures, topk_codes
from cwac_lab.diagnostics.seen import Seen

# Explained variance, on activations of shape (N, D), of an autoencoder trained on the start model.
Explains = Callable[[Float[Tensor, "N D"]], float]


def latent_drift(x0: Float[Tensor, "N D"], x: Float[Tensor, "N D"], features: LayerFeatures) -> dict[str, float]:
    """Return how far the latents of an autoencoder moved between two states of the same N tokens.

    ``chosen`` and ``others`` are mean squared changes of the pre-activations of the safety latents and of the rest,
    each latent in units of its standard deviation over the tokens before; ``code`` is ``||z[S] - z0[S]|| / ||z0[S]||``
    of the TopK codes, the paper's z.
    """
    before, now = (rows @ features.weight + features.bias for rows in (x0, x))
    deviation = before.std(0)
    moved = ((now - before) / deviation.clamp_min(1e-3 * float(deviation.mean()))).square().mean(0)
    rest = torch.ones_like(moved, dtype=torch.bool)
    rest[features.latents] = False
    z0, z = (topk_codes(r, features.weight, features.bias, features.k)[:, features.latents] for r in (x0, x))
    return {
        "layer": features.layer,
        "chosen": float(moved[features.latents].mean()),
        "others": float(moved[rest].mean()),
        "code": float((z - z0).norm() / z0.norm().clamp_min(torch.finfo(z.dtype).tiny)),
    }


def refusal_directions(
    harmful: Float[Tensor, "N L D"], benign: Float[Tensor, "M L D"]
) -> tuple[Float[Tensor, "L D"], Float[Tensor, " L"]]:
    """Return, by layer, the unit difference of means at the last prompt token (Arditi et al. 2024), and its length."""
    difference = harmful.mean(0) - benign.mean(0)
    length = difference.norm(dim=-1)
    return difference / length.clamp_min(torch.finfo(length.dtype).tiny)[:, None], length


def stream_drift(
    start: dict[str, Seen], now: dict[str, Seen], features: Sequence[LayerFeatures] = (),
    explains: dict[int, Explains] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Return the cosine of the refusal direction to its start by layer, drift of latents, and reconstruction.

    Args:
        start: What was seen of the start, by kind of prompts, among them ``harmful`` and ``benign``.
        now: The same of the model now.
        features: Encoders and safety latents, by layer.
        explains: By layer, what tells how well the autoencoder of the start describes activations.
    """
    (before, length0), (after, length) = (
        refusal_directions(seen["harmful"].last, seen["benign"].last) for seen in (start, now)
    )
    separation = length / length0.clamp_min(torch.finfo(length.dtype).tiny)
    found: dict[str, Any] = {
        "refusal_direction": {
            "cosine": cosine_similarity(before, after, dim=-1).tolist(),
            "separation": separation.tolist(),
        },
        "latents": {
            kind: [latent_drift(start[kind].tokens[f.layer], now[kind].tokens[f.layer], f) for f in features]
            for kind in start
        },
    }
    if explains:
        found["reconstruction"] = {
            str(layer): {
                kind: {"start": explained(start[kind].tokens[layer]), "now": explained(now[kind].tokens[layer])}
                for kind in start
            }
            for layer, explained in explains.items()
        }
    return found


def divergences(start: Float[Tensor, "A V"], now: Float[Tensor, "A V"]) -> Float[Tensor, " A"]:
    """Return ``KL(p0 || p)`` in nats at each of A tokens, of log-probabilities; what p0 never says adds nothing."""
    return kl_div(now, start, log_target=True, reduction="none").masked_fill(start.isneginf(), 0.0).sum(-1)


def divergence(start: Float[Tensor, "A V"], now: Float[Tensor, "A V"]) -> float:
    """Return the mean of ``KL(p0 || p)`` in nats, of log-probabilities at the same A answer tokens."""
    return float(divergences(start, now).mean())
