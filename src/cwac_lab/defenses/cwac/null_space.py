"""What the safety subspace leaves free of linear layers, as factors that train (``tuning=null_space``)."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cwac_lab.core import distributed
from cwac_lab.defenses.cwac.subspace.reading import batched, fill, passes
from cwac_lab.defenses.cwac.subspace.solvers import cheapest
from cwac_lab.defenses.cwac.subspace.spec import Subspace, SubspaceSpec
from cwac_lab.models import adapters
from cwac_lab.models.adapters import TARGETS, TuningConfig
from cwac_lab.models.sites import OF_EXPERTS, Site, decoder_layers, linears, paths_in

# Training rows that are read, at most, to find the directions along which they vary.
READ = 256


def free_directions(
    model: Any, spec: SubspaceSpec, subspace: Subspace, tuning: TuningConfig, rows: Sequence[Sequence[int]] = (),
    seed: int = 0, pad_id: int = 0,
) -> dict[str, Float[Tensor, "d c"]]:  # fmt: skip
    """Return U, what is free of the inputs of each linear layer that gets factors, by the layer's name.

    Args:
        model: The model, without factors.
        spec: What the defence asks of the subspace.
        subspace: The protected directions of its sites.
        tuning: What gets factors, within the scope of the subspace; experts are left out. With a ``rank`` r, U has the
            r free directions along which the training rows vary most: the leading eigenvectors of ``U^T C U``, where C
            is the second moment of their tokens, as ``spec`` counts and scales them.
        rows: Token ids of the training rows; ``READ`` of them, drawn with the seed, are read.
        seed: Seed of the draw.
        pad_id: Id to pad with.
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
    free = {site: subspace.spans[site.name].complement for site in sites}
    if tuning.rank is not None:
        read = random.Random(seed).sample(list(rows), min(len(rows), READ))
        free = _leading(model, spec, free, tuning.rank, read, pad_id)
    return {linear.name.removesuffix(".weight"): free[linear.site] for linear in found}


class _Coordinates:
    """Gives a solver the coordinates U^T x of tokens x along directions U (d, c), in float64."""

    def __init__(self, basis: Float[Tensor, "d c"], n: int, rank: int) -> None:
        self.basis = basis.double()
        self.solver = cheapest(n, basis.shape[1], rank)(basis.shape[1], basis.device)

    def add(self, rows: Float[Tensor, "N d"], labels: Int[Tensor, " N"]) -> None:
        self.solver.add(rows @ self.basis.to(rows.device))

    def solve(self, rank: int) -> Float[Tensor, "d r"]:
        return (self.basis @ self.solver.solve(None, rank)[0].to(self.basis.device)).float().contiguous()


@torch.no_grad()
def _leading(
    model: Any, spec: SubspaceSpec, free: Mapping[Site, Float[Tensor, "d c"]], rank: int,
    rows: Sequence[Sequence[int]], pad_id: int,
) -> dict[Site, Float[Tensor, "d r"]]:  # fmt: skip
    """Return, by site, the directions within free ones along which rows vary most; all where there are no more."""
    n = sum(map(len, rows))
    found = dict(free)
    sizes = {site: 8 * basis.shape[1] * min(n, basis.shape[1]) for site, basis in free.items() if basis.shape[1] > rank}
    batches = batched(rows, None, 16)[distributed.rank() :: distributed.world()]
    for group in passes(sizes) if sizes else ():
        held = {site: _Coordinates(free[site].to(model.device), n, rank) for site in group}
        fill(held, model, batches, spec, pad_id, "reading the inputs of training rows, batches")
        found |= {site: held.pop(site).solve(rank) for site in group}
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
