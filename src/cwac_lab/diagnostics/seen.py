"""What a model computes on prompts and the first tokens of their answers, all of it read in one forward a batch."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cwac_lab.data.batches import collate
from cwac_lab.models.answers import Batch, answer_logits, to_device
from cwac_lab.models.capture import layer_states, site_inputs, without_sinks
from cwac_lab.models.chat import IGNORED, Encoded
from cwac_lab.models.sites import Site, decoder_layers


@dataclass(frozen=True)
class Seen:
    """What a model computed on B prompts, in float32 in the memory of the CPU; sinks and padding are left out.

    Attributes:
        inputs: By site the inputs of its linear layers, (N, d). Tokens of an opening that n rows share are there once,
            times the root of n, so that norms and second moments are those of all M tokens.
        tokens: By hooked layer the residual stream after it at all tokens, (M, D).
        last: The residual stream after every layer at the last token of the prompts, (B, L, D).
        log_probs: At the A answer tokens, (A, V).
    """

    inputs: dict[Site, Float[Tensor, "N d"]]
    tokens: dict[int, Float[Tensor, "M D"]]
    last: Float[Tensor, "B L D"]
    log_probs: Float[Tensor, "A V"]

    def finite(self) -> bool:
        """Tell whether all of it is finite."""
        seen = (*self.inputs.values(), *self.tokens.values(), self.last, self.log_probs)
        return all(bool(x.isfinite().all()) for x in seen)


def _whole(parts: list[Float[Tensor, "_ _ d"]], n_rows: int) -> Float[Tensor, "B T d"]:
    """Return the states of all rows; those of a shared opening, where there is one, come first, of one row."""
    return torch.cat([part.expand(n_rows, -1, -1) for part in parts], 1) if len(parts) > 1 else parts[0]


class Reader:
    """Reads models on the same rows: the first that it reads, the start, decides which tokens are attention sinks."""

    def __init__(
        self, rows: Sequence[Encoded], pad_id: int, scope: str = "ffn_out", hooked: Collection[int] = (),
        batch_size: int = 16,
    ) -> None:  # fmt: skip
        """Take what is read.

        Args:
            rows: Prompts; answers are what their labels say, if anything.
            pad_id: Id to pad with.
            scope: Linear layers, a key of ``SCOPES``.
            hooked: Decoder layers whose output is kept at all tokens.
            batch_size: Rows per forward.
        """
        ordered = sorted(rows, key=lambda row: len(row.input_ids))
        self._batches = [collate(ordered[at : at + batch_size], pad_id) for at in range(0, len(ordered), batch_size)]
        self._scope, self._hooked = scope, sorted(hooked)
        self._keep: dict[Hashable, Bool[Tensor, "B T"]] = {}
        self.answer_tokens = sum(label != IGNORED for row in rows for label in row.labels)

    @torch.no_grad()
    def read(self, model: Any) -> Seen:
        """Return what a model computes, in evaluation mode, with adapters or without."""
        inputs: dict[Site, list[Tensor]] = {}
        tokens: dict[int, list[Tensor]] = {}
        last, log_probs = [], []
        for number, batch in enumerate(self._batches):
            sites, layers, logits = self._forward(model, to_device(batch, model.device))
            log_probs.append(logits.float().log_softmax(-1).cpu())
            n_rows, prompt = len(batch["input_ids"]), prompt_mask(batch)
            for site, parts in sites.items():
                keep = self._kept((site, number), parts, prompt)
                inputs.setdefault(site, []).append(_once(parts, keep))
            for layer in self._hooked:
                keep = self._kept((layer, number), layers[layer], prompt)
                tokens.setdefault(layer, []).append(_whole(layers[layer], n_rows)[keep])
            ends = prompt.sum(1) - 1
            last.append(torch.stack([_whole(p, n_rows)[torch.arange(n_rows), ends] for p in layers.values()], 1))
        return Seen(
            {site: torch.cat(parts) for site, parts in inputs.items()},
            {layer: torch.cat(parts) for layer, parts in tokens.items()},
            torch.cat(last),
            torch.cat(log_probs),
        )

    def _forward(
        self, model: Any, batch: Batch
    ) -> tuple[dict[Site, list[Tensor]], dict[int, list[Tensor]], Float[Tensor, "A V"]]:
        """Return the inputs of the sites and the outputs of all layers, each in one or two parts, and the logits."""
        sites: dict[Site, list[Tensor]] = {}

        def receive(site: Site, x: Tensor) -> None:
            sites.setdefault(site, []).append(x.float().cpu())

        every = range(len(decoder_layers(model)))
        with site_inputs(model, self._scope, receive), layer_states(model, every) as found:
            logits, _ = answer_logits(model, batch)
        return sites, {layer: [part.float().cpu() for part in parts] for layer, parts in found.items()}, logits

    def _kept(self, place: Hashable, parts: list[Tensor], prompt: Int[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
        """Return which tokens count at a place: of the prompts, and no sinks when it was read first."""
        if place not in self._keep:
            self._keep[place] = without_sinks(_whole(parts, len(prompt)), prompt)
        return self._keep[place]


def prompt_mask(batch: Batch) -> Int[Tensor, "B T"]:
    """Return a mask that is 1 on the tokens of the prompts."""
    answered = (batch["labels"] != IGNORED).int().cumsum(1) > 0
    return batch["attention_mask"] * ~answered


def _once(parts: list[Float[Tensor, "_ _ d"]], keep: Bool[Tensor, "B T"]) -> Float[Tensor, "N d"]:
    """Return the kept tokens, those of a shared opening once, times the root of the number of rows."""
    if len(parts) == 1:
        return parts[0][keep]
    opening, rest = parts
    shared = opening.shape[1]
    return torch.cat([len(keep) ** 0.5 * opening[0][keep[0, :shared]], rest[keep[:, shared:]]])
