"""What the safety subspace leaves free of linear layers, as factors that train (``tuning=null_space``)."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cwac_lab.core import distributed
from cwac_lab.core.progress import track
from cwac_lab.defenses.cwac.subspace.reading import batched, fill, passes
from cwac_lab.defenses.cwac.subspace.solvers import Solver, cheapest
from cwac_lab.defenses.cwac.subspace.span import Span
from cwac_lab.defenses.cwac.subspace.spec import Subspace, SubspaceSpec
from cwac_lab.models import adapters
from cwac_lab.models.adapters import TARGETS, TuningConfig
from cwac_lab.models.sites import OF_EXPERTS, Site, decoder_layers, linears, paths_in

# Tokens of training rows that are read, at most, to find the directions that hold most of them.
READ = 8192


def free_directions(
    model: Any, spec: SubspaceSpec, subspace: Subspace, tuning: TuningConfig, rows: Sequence[Sequence[int]] = (),
    seed: int = 0, pad_id: int = 0,
) -> dict[str, Float[Tensor, "d c"]]:  # fmt: skip
    """Return U, what is free of the inputs of each linear layer that gets factors, by the layer's name.

    Args:
        model: The model, without factors.
        spec: What the defence asks of the subspace.
        subspace: The protected directions of its sites.
        tuning: What gets factors, within the scope of the subspace; experts are left out. With ``free_directions`` U is
            cut to so many of its span, about the leading eigenvectors of ``U^T C U``: C is the second moment of the
            training rows' tokens at the start, of unit norm where ``spec`` says so, all parts of a row alike. There are
            fewer where fewer are free, or where these tokens have fewer.
        rows: Token ids of the training rows; of those, drawn with the seed, about ``READ`` tokens are read.
        seed: Seed of the draw.
        pad_id: Id to pad with.

    Raises:
        ValueError: If directions are to be chosen and there are no rows.
    """
    adapted = {
        layer.get_submodule(path)
        for layer in decoder_layers(model)
        for path in paths_in(layer, TARGETS[tuning.modules])
        if path not in OF_EXPERTS
    }
    found = [
        linear for linear in linears(model, spec.modules) if linear.site.expert is None and linear.module in adapted
    ]
    sites = dict.fromkeys(linear.site for linear in found)  # layers that read one input share it
    spans = {site: subspace.spans[site.name] for site in sites}
    if tuning.free_directions is None:
        free = {site: span.complement for site, span in spans.items()}
    else:
        free = _leading(model, spec, spans, tuning.free_directions, _drawn(rows, seed), pad_id)
    return {linear.name.removesuffix(".weight"): free[linear.site] for linear in found}


def _drawn(rows: Sequence[Sequence[int]], seed: int) -> list[Sequence[int]]:
    """Return rows in an order drawn with a seed, up to the one with which they have ``READ`` tokens."""
    if not rows:
        raise ValueError("no training rows to choose free directions by")
    ordered = random.Random(seed).sample(list(rows), len(rows))
    before = accumulate(map(len, ordered), initial=0)
    return [row for row, n in zip(ordered, before, strict=False) if n < READ]


class _Coordinates:
    """Gives a solver the coordinates U^T x of tokens x along directions U (d, c), in float64."""

    def __init__(self, basis: Float[Tensor, "d c"], solver: Solver) -> None:
        self.basis, self.solver = basis, solver

    def add(self, rows: Float[Tensor, "N d"], labels: Int[Tensor, " N"]) -> None:
        self.solver.add(rows @ self.basis.to(rows))

    def solve(self, rank: int) -> Float[Tensor, "d r"]:
        """Return the directions, those of the first process: an eigensolver may turn them on another machine."""
        found = self.solver.solve(None, rank)[0]
        return distributed.told((self.basis.to(found) @ found).float().cpu()).to(self.basis.device).contiguous()


@torch.no_grad()
def _leading(
    model: Any, spec: SubspaceSpec, spans: Mapping[Site, Span], rank: int, rows: Sequence[Sequence[int]], pad_id: int
) -> dict[Site, Float[Tensor, "d r"]]:
    """Return, by site, the directions outside a span that hold most of some rows; all where there are no more."""
    n = sum(map(len, rows))
    free = {site: span.width - span.rank for site, span in spans.items()}
    found = {site: spans[site].complement for site, c in free.items() if c <= rank}
    widths = {site: c for site, c in free.items() if c > rank}
    kinds = {site: cheapest(n, c, rank) for site, c in widths.items()}
    sizes = {site: kinds[site].size(n, c) + 4 * c * spans[site].width for site, c in widths.items()}
    batches = batched(rows, None, 16)[distributed.rank() :: distributed.world()]
    for group in passes(sizes) if sizes else ():
        held = {
            site: _Coordinates(spans[site].complement.to(model.device), kinds[site](widths[site], model.device))
            for site in group
        }
        fill(held, model, batches, spec, pad_id, "reading the inputs of training rows, batches")
        found |= {site: held.pop(site).solve(rank) for site in track(group, "finding the free directions, sites")}
    return found


def free_share(model: Any, scope: str, subspace: Subspace) -> float:
    """Return which share of the weights of a scope is free, that is how many numbers ``tuning=null_space`` trains."""
    found = [(len(linear.weight), subspace.spans[linear.site.name]) for linear in linears(model, scope)]
    return sum(rows * (span.width - span.rank) for rows, span in found) / sum(rows * span.width for rows, span in found)


def attach(
    model: Any, tuning: TuningConfig, seed: int, spec: SubspaceSpec | None, subspace: Subspace | None,
    rows: Sequence[Sequence[int]] = (), pad_id: int = 0,
) -> Callable[[], object]:  # fmt: skip
    """Give a model the adapters that a run trains, in place, before its defence is prepared.

    Args:
        model: The model.
        tuning: What is trained.
        seed: Seed of factors that are drawn, and of the draw of rows.
        spec: What the defence asks of the subspace, where it asks for one.
        subspace: What it is given.
        rows: Token ids of the training rows.
        pad_id: Id to pad them with.

    Returns:
        What ``adapters.attach`` does.
    """
    free = None
    if tuning.method == "null_space" and spec is not None and subspace is not None:
        free = free_directions(model, spec, subspace, tuning, rows, seed, pad_id)
    return adapters.attach(model, tuning, seed, free)
