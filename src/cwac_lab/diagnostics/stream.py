"""What moved in the residual stream and in the first words of answers: refusal direction, latents, distributions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import cosine_similarity, kl_div

from cwac_lab.baselines.start import StartValues
from cwac_lab.data.batches import collate, pad
from cwac_lab.models.answers import answer_logits, to_device
from cwac_lab.models.capture import layer_outputs, without_sinks
from cwac_lab.models.chat import IGNORED, Encoded
from cwac_lab.models.sites import decoder_layers
from cwac_lab.sae.latents import LayerFeatures, topk_codes

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


class StreamProbe:
    """Keeps the residual stream of the start: the last prompt token after every layer, all tokens after hooked ones."""

    def __init__(
        self, model: Any, prompts: dict[str, Sequence[Sequence[int]]], pad_id: int,
        features: Sequence[LayerFeatures] = (), explains: dict[int, Explains] | None = None, batch_size: int = 16,
    ) -> None:  # fmt: skip
        """Run the start model on prompts of the kinds ``harmful`` and ``benign``.

        Args:
            model: The start, in evaluation mode.
            prompts: Token ids by kind.
            pad_id: Id to pad with.
            features: Encoders and safety latents, by layer.
            explains: By layer, what tells how well the autoencoder of the start describes activations.
            batch_size: Prompts per forward.
        """
        self._batches = {}
        for kind, rows in prompts.items():
            ordered = sorted(rows, key=len)
            parts = [ordered[at : at + batch_size] for at in range(0, len(ordered), batch_size)]
            self._batches[kind] = [pad(part, pad_id) for part in parts]
        self._features = [feature.to(torch.device("cpu")) for feature in features]
        self._explains = explains or {}
        self._keep: dict[tuple[str, int], list[Bool[Tensor, "B T"]]] = {}
        self._last, self._tokens = self._states(model)

    @torch.no_grad()
    def _states(
        self, model: Any
    ) -> tuple[dict[str, Float[Tensor, "N L D"]], dict[tuple[str, int], Float[Tensor, "N D"]]]:
        """Return by kind the states (N, L, D) at the last prompt token, and by kind and hooked layer all tokens'."""
        layers = range(len(decoder_layers(model)))
        last: dict[str, list[Tensor]] = {}
        tokens: dict[tuple[str, int], list[Tensor]] = {}
        for kind, batches in self._batches.items():
            for number, (ids, mask) in enumerate(batches):
                x = layer_outputs(model, layers, ids.to(model.device), mask.to(model.device))
                ends = mask.sum(1) - 1
                at_end = [x[layer].float().cpu()[torch.arange(len(ids)), ends] for layer in layers]
                last.setdefault(kind, []).append(torch.stack(at_end, 1))
                for feature in self._features:
                    place, rows = (kind, feature.layer), x[feature.layer].float().cpu()
                    if len(self._keep.setdefault(place, [])) == number:
                        self._keep[place].append(without_sinks(rows, mask))
                    tokens.setdefault(place, []).append(rows[self._keep[place][number]])
        joined = {kind: torch.cat(parts) for kind, parts in last.items()}
        return joined, {place: torch.cat(parts) for place, parts in tokens.items()}

    def measure(self, model: Any) -> dict[str, Any]:
        """Return the cosine of the refusal direction to its start by layer, drift of latents, and reconstruction."""
        last, tokens = self._states(model)
        (before, length0), (now, length) = (
            refusal_directions(states["harmful"], states["benign"]) for states in (self._last, last)
        )
        separation = length / length0.clamp_min(torch.finfo(length.dtype).tiny)
        found: dict[str, Any] = {
            "refusal_direction": {
                "cosine": cosine_similarity(before, now, dim=-1).tolist(),
                "separation": separation.tolist(),
            },
            "latents": {
                kind: [latent_drift(self._tokens[kind, f.layer], tokens[kind, f.layer], f) for f in self._features]
                for kind in self._batches
            },
        }
        if self._explains:
            found["reconstruction"] = {
                str(layer): {
                    kind: {"start": explains(self._tokens[kind, layer]), "now": explains(tokens[kind, layer])}
                    for kind in self._batches
                }
                for layer, explains in self._explains.items()
            }
        return found


class AnswerProbe:
    """Keeps the start's distributions at the first tokens of its own answers."""

    def __init__(self, model: Any, rows: Sequence[Encoded], pad_id: int, batch_size: int = 16) -> None:
        """Compute them; ``rows`` are prompts with the first tokens of the start's answers as labels."""
        self._rows, self._pad_id, self._size = rows, pad_id, batch_size
        self.n = sum(label != IGNORED for row in rows for label in row.labels)
        self._start = StartValues(
            lambda batch: answer_logits(model, batch)[0].float().log_softmax(-1), rows, pad_id, model.device, batch_size
        )

    @torch.no_grad()
    def measure(self, model: Any) -> float:
        """Return the mean of ``KL(p0 || p)`` over these tokens, in nats."""
        parts = []
        for at in range(0, len(self._rows), self._size):
            batch = to_device(collate(self._rows[at : at + self._size], self._pad_id), model.device)
            now = answer_logits(model, batch)[0].float().log_softmax(-1)
            parts.append(kl_div(now, self._start.of(batch), log_target=True, reduction="none").sum(-1).cpu())
        return float(torch.cat(parts).mean())
