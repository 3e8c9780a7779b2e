"""Read the inputs of linear layers on texts, batch by batch, each token with the part of the text that it is of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cwac_lab.core.progress import track
from cwac_lab.data.batches import pad
from cwac_lab.defenses.cwac.subspace.parts import Parts, parts_of
from cwac_lab.defenses.cwac.subspace.spec import SubspaceSpec
from cwac_lab.models.capture import site_inputs, truncated, without_sinks
from cwac_lab.models.sites import Site, decoder

Text = tuple[Sequence[int], Parts]
# Bytes that accumulate at once, at most.
MEMORY = 8 * 2**30


def batched(prompts: Sequence[Sequence[int]], parts: Sequence[Parts] | None, size: int) -> list[list[Text]]:
    """Divide prompts, by their length, into batches; each with its parts."""
    texts = list(zip(prompts, parts_of(prompts) if parts is None else parts, strict=True))
    ordered = sorted(texts, key=lambda text: len(text[0]))
    return [ordered[begin : begin + size] for begin in range(0, len(ordered), size)]


def passes(sizes: Mapping[Site, int]) -> Iterator[list[Site]]:
    """Divide sites, in their order, so that what a forward fills stays within ``MEMORY`` (or is a single site)."""
    group: list[Site] = []
    for site in sizes:
        if group and sum(sizes[held] for held in group) + sizes[site] > MEMORY:
            yield group
            group = []
        group.append(site)
    yield group


class Receiver(Protocol):
    """Takes the inputs of a site, rows of shape (N, d), batch by batch, and which part each is of."""

    def add(self, rows: Float[Tensor, "N d"], labels: Int[Tensor, " N"]) -> None:
        """Take some tokens of one site."""


def fill(
    held: Mapping[Site, Receiver], model: Any, batches: Sequence[Sequence[Text]], spec: SubspaceSpec, pad_id: int,
    title: str = "reading the inputs of reference prompts, batches",
) -> None:  # fmt: skip
    """Give the inputs of sites on batches of texts to who receives them, token by token as the spec counts them."""
    counted: Int[Tensor, "B T"]
    labels: Int[Tensor, "B T"]

    def receive(site: Site, x: Float[Tensor, "B T d"], read: Bool[Tensor, "B T"] | None = None) -> None:
        real = counted if read is None else counted * read
        kept = without_sinks(x, real) if spec.tokens == "no_sinks" else real.bool()
        rows = x[kept].double()
        if spec.normalize:
            rows = rows / rows.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
        held[site].add(rows, labels[kept])

    names, last = {site.name for site in held}, max(site.layer for site in held)
    with site_inputs(model, spec.modules, receive, names), truncated(model, last + 1):
        for batch in track(batches, title):
            ids, mask = pad([text for text, _ in batch], pad_id)
            counted = mask.to(model.device)
            labels = torch.stack([parts.labels(ids.shape[1]) for _, parts in batch]).to(model.device)
            decoder(model)(input_ids=ids.to(model.device), attention_mask=counted, use_cache=False)
