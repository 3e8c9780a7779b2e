"""All measurements of drift on the same prompts: the start's, taken once, against any later state of the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from cwac_lab.core.errors import Diverged
from cwac_lab.defenses.cwac.sae.latents import LayerFeatures
from cwac_lab.defenses.cwac.subspace.spec import Subspace
from cwac_lab.diagnostics.linear import Drift, LinearProbe
from cwac_lab.diagnostics.seen import Reader
from cwac_lab.diagnostics.stream import Explains, divergence, stream_drift
from cwac_lab.models.chat import IGNORED, Encoded

KINDS = ("harmful", "benign")
# Tokens of an answer whose distributions are compared: refusals are decided there (Qi et al. 2025).
FIRST_TOKENS = 5
_NO_NUMBERS = "what the model computes is not finite: there is no drift to measure"


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Put a model into evaluation mode for a while."""
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)


def first_tokens(row: Encoded) -> Encoded:
    """Return a prompt and its answer cut after ``FIRST_TOKENS`` tokens."""
    length = sum(label == IGNORED for label in row.labels) + FIRST_TOKENS
    return Encoded(row.input_ids[:length], row.labels[:length])


class Probe:
    """What the start computes on held-out prompts of both kinds."""

    def __init__(
        self, model: Any, answered: dict[str, Sequence[Encoded]], pad_id: int, start_weight: Callable[[str], Tensor],
        *, scope: str = "ffn_out", subspace: Subspace | None = None, features: Sequence[LayerFeatures] = (),
        explains: dict[int, Explains] | None = None,
    ) -> None:  # fmt: skip
        """Run the start on the prompts.

        Args:
            model: The start.
            answered: Prompts by kind, one of ``KINDS``, with the start's own answers.
            pad_id: Id to pad with.
            start_weight: Reader of a start weight by parameter name.
            scope: Linear layers that are decomposed; the paper's are the FFN outputs.
            subspace: Protected directions, for the leak.
            features: Encoders and safety latents.
            explains: By layer, how well the start's autoencoder describes activations.
        """
        self._spans = subspace.spans if subspace is not None else {}
        self._features, self._explains = [feature.to(torch.device("cpu")) for feature in features], explains
        hooked = {feature.layer for feature in features} | set(explains or ())
        rows = {kind: [first_tokens(row) for row in answered[kind]] for kind in KINDS}
        self._readers = {kind: Reader(rows[kind], pad_id, scope, hooked) for kind in KINDS}
        with evaluating(model):
            self._start = {kind: reader.read(model) for kind, reader in self._readers.items()}
        self._linear = {kind: LinearProbe(seen.inputs, start_weight, scope) for kind, seen in self._start.items()}
        self.facts = {
            "scope": scope,
            "prompts": {kind: len(rows[kind]) for kind in KINDS},
            "first_tokens": {kind: reader.answer_tokens for kind, reader in self._readers.items()},
        }

    def measure(self, model: Any, *, bounds: bool = False) -> dict[str, Any]:
        """Return how far a model is from the start, as JSON-able figures; the model stays as it is.

        ``bounds`` adds the bounds of ``diagnostics.linear.bound``.

        Raises:
            Diverged: If the model no longer computes finite numbers.
        """
        with evaluating(model):
            now = {kind: reader.read(model) for kind, reader in self._readers.items()}
        if not all(seen.finite() for seen in now.values()):
            raise Diverged(_NO_NUMBERS)
        layers = {
            kind: probe.measure(model, now[kind].inputs, self._spans, bounds=bounds)
            for kind, probe in self._linear.items()
        }
        found = {**self.facts, **stream_drift(self._start, now, self._features, self._explains)}
        found["kl_first_tokens"] = {  # None: of other vocabularies
            kind: divergence(self._start[kind].log_probs, now[kind].log_probs)
            if self._start[kind].log_probs.shape == now[kind].log_probs.shape
            else None
            for kind in KINDS
        }
        found["layers"] = {kind: [asdict(drift) for drift in drifts] for kind, drifts in layers.items()}
        found["summary"] = _summary(found, layers)
        if not all(math.isfinite(value) for means in found["summary"].values() for value in means.values()):
            raise Diverged(_NO_NUMBERS)
        return found


def _summary(found: dict[str, Any], layers: dict[str, list[Drift]]) -> dict[str, dict[str, float]]:
    """Return, by kind, the means over layers of every measurement; the refusal direction's is of both kinds."""
    means: dict[str, dict[str, float]] = {}
    for kind, drifts in layers.items():
        names = ("weight", "activation", "cross", "total", "overlap", "leak", "bound")
        taken = {name: [value for d in drifts if (value := getattr(d, name)) is not None] for name in names}
        means[kind] = {name: fmean(values) for name, values in taken.items() if values}
        if found["kl_first_tokens"][kind] is not None:
            means[kind]["kl"] = found["kl_first_tokens"][kind]
        for name in ("chosen", "others", "code") if found["latents"][kind] else ():
            means[kind][f"latents_{name}"] = fmean(each[name] for each in found["latents"][kind])
        means[kind]["refusal_cosine"] = fmean(found["refusal_direction"]["cosine"])
    return means
