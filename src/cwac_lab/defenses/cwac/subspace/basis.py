"""Build, save and load the bases of the weight constraint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from cwac_lab.core import distributed
from cwac_lab.core.cache import read_json, reading, write_json
from cwac_lab.core.progress import track
from cwac_lab.data.batches import pad
from cwac_lab.defenses.cwac.subspace.solvers import Routed, Solver, cheapest
from cwac_lab.models.capture import site_inputs, truncated, without_sinks
from cwac_lab.models.sites import Site, decoder, linears

# Bytes that accumulate at once, at most.
MEMORY = 8 * 2**30


@dataclass(frozen=True)
class SubspaceSpec:
    """What a defence asks of the safety subspace; also its cache key.

    Attributes:
        modules: Scope of linear layers, a key of ``SCOPES``.
        energy: Share of the trace that the protected directions hold, in (0, 1]; exclusive with ``rank``.
        rank: Fixed number of protected directions per site.
        tokens: ``all`` tokens of the reference prompts, or ``no_sinks``.
        normalize: Scale each token's activation to unit norm, so that energy is not owned by outlier tokens.
        held_on: ``harmful`` reference prompts, or ``both`` kinds.
    """

    modules: str
    energy: float | None
    rank: int | None
    tokens: str
    normalize: bool
    held_on: str = "harmful"


@dataclass(frozen=True)
class Subspace:
    """Per site name the protected directions V of shape (d_in, k), and the share of the trace they hold."""

    bases: dict[str, Float[Tensor, "d k"]]
    energy: dict[str, float]


@dataclass(frozen=True)
class Directions:
    """The protected directions V of a site's input, shape (d_in, k), their share of the trace, how they were found."""

    basis: Float[Tensor, "d k"]
    kept: float
    solver: str


def _passes(sizes: dict[Site, int]) -> Iterator[list[Site]]:
    """Divide sites, in their order, so that what a forward fills stays within ``MEMORY`` (or is a single site)."""
    group: list[Site] = []
    for site in sizes:
        if group and sum(sizes[held] for held in group) + sizes[site] > MEMORY:
            yield group
            group = []
        group.append(site)
    yield group


def _batched(prompts: Sequence[Sequence[int]], size: int) -> list[list[Sequence[int]]]:
    """Divide prompts, by their length, into batches."""
    ordered = sorted(prompts, key=len)
    return [ordered[begin : begin + size] for begin in range(0, len(ordered), size)]


class _Receiver(Protocol):
    """Takes the inputs of a site, rows of shape (N, d), batch by batch."""

    def add(self, rows: Float[Tensor, "N d"]) -> None: ...


def _fill(
    held: Mapping[Site, _Receiver],
    model: Any,
    batches: Sequence[Sequence[Sequence[int]]],
    spec: SubspaceSpec,
    pad_id: int,
) -> None:
    counted: Int[Tensor, "B T"]

    def receive(site: Site, x: Float[Tensor, "B T d"], read: Bool[Tensor, "B T"] | None = None) -> None:
        real = counted if read is None else counted * read
        rows = x[without_sinks(x, real) if spec.tokens == "no_sinks" else real.bool()].double()
        if spec.normalize:
            rows = rows / rows.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
        held[site].add(rows)

    names, last = {site.name for site in held}, max(site.layer for site in held)
    with site_inputs(model, spec.modules, receive, names), truncated(model, last + 1):
        for batch in track(batches, "reading the inputs of reference prompts, batches"):
            ids, mask = pad(batch, pad_id)
            counted = mask.to(model.device)
            decoder(model)(input_ids=ids.to(model.device), attention_mask=counted, use_cache=False)


@torch.no_grad()
def leading(
    model: Any, prompts: Sequence[Sequence[int]], spec: SubspaceSpec, pad_id: int, batch_size: int = 16
) -> Iterator[tuple[str, Directions]]:
    """Yield the leading directions of every site's input over the tokens of some prompts, streamed by batch.

    The processes of a run take a part of the prompts each. Where all sites at once would hold too much, the prompts are
    run several times, each as far as the last layer that is needed.

    Args:
        model: The aligned model, in evaluation mode.
        prompts: Token ids of the reference prompts.
        spec: Scope of sites, tokens that count, whether they are scaled to unit norm, and how many directions.
        pad_id: Id to pad with.
        batch_size: Prompts per forward.
    """
    matrices = {matrix.site: matrix for matrix in linears(model, spec.modules)}
    widths = {site: matrix.width for site, matrix in matrices.items()}
    n = sum(map(len, prompts))
    ranks = {site: None if spec.rank is None else min(spec.rank, width) for site, width in widths.items()}
    kinds: dict[Site, type[Solver]] = {
        site: cheapest(n, width, ranks[site]) if site.expert is None else Routed for site, width in widths.items()
    }
    read = {site: round(n * matrix.share) for site, matrix in matrices.items()}
    batches = _batched(prompts, batch_size)
    for group in _passes({site: kinds[site].size(read[site], width) for site, width in widths.items()}):
        held: dict[Site, Solver] = {site: kinds[site](widths[site], model.device) for site in group}
        _fill(held, model, batches[distributed.rank() :: distributed.world()], spec, pad_id)
        for site in group:
            basis, kept = held.pop(site).solve(spec.energy, ranks[site])
            yield site.name, Directions(basis.float().contiguous(), kept, kinds[site].name)


def build(model: Any, prompts: Sequence[Sequence[int]], spec: SubspaceSpec, pad_id: int, folder: Path) -> None:
    """Compute the bases of all sites and save them with a report of rank, share of variance kept and solver."""
    found = dict(leading(model, prompts, spec, pad_id))
    save_file({name: each.basis.cpu() for name, each in found.items()}, folder / "bases.safetensors")
    report = {
        name: {"rank": each.basis.shape[1], "width": each.basis.shape[0], "kept": each.kept, "solver": each.solver}
        for name, each in found.items()
    }
    write_json(folder / "report.json", report)


class _Share:
    """Adds up what of the inputs of a site lies in directions V of shape (d, k), and all of it."""

    def __init__(self, basis: Float[Tensor, "d k"]) -> None:
        self.basis, self.within, self.whole = basis.double(), 0.0, 0.0

    def add(self, rows: Float[Tensor, "N d"]) -> None:
        self.within += float((rows @ self.basis).square().sum())
        self.whole += float(rows.square().sum())


@torch.no_grad()
def covered(
    model: Any,
    prompts: Sequence[Sequence[int]],
    subspace: Subspace,
    spec: SubspaceSpec,
    pad_id: int,
    batch_size: int = 16,
) -> float:
    """Return how much of the inputs of some prompts lies in the protected directions: ``||V^T x||^2 / ||x||^2``.

    Squares are summed over tokens, counted and scaled as for the subspace itself; the mean is over the sites that read
    any. Of the prompts that it was built from it is the mean of ``Subspace.energy`` over these.

    Args:
        model: The aligned model, in evaluation mode.
        prompts: Token ids.
        subspace: The directions.
        spec: How they were built.
        pad_id: Id to pad with.
        batch_size: Prompts per forward.
    """
    sites = dict.fromkeys(matrix.site for matrix in linears(model, spec.modules))
    shares = {site: _Share(subspace.bases[site.name].to(model.device)) for site in sites}
    _fill(shares, model, _batched(prompts, batch_size), spec, pad_id)
    found = [share.within / share.whole for share in shares.values() if share.whole]
    return sum(found) / len(found) if found else 0.0


def unread(subspace: Subspace) -> tuple[int, int]:
    """Return how many experts read no token of the prompts that a subspace is built from, and how many there are."""
    kept: dict[str, float] = {}
    for name, share in subspace.energy.items():
        expert = name.rpartition(".")[0]
        if ".experts." in expert:
            kept[expert] = max(kept.get(expert, 0.0), share)
    return sum(not share for share in kept.values()), len(kept)


def load(folder: Path) -> Subspace:
    """Load what ``build`` saved.

    Raises:
        LabError: If it is damaged.
    """
    with reading(folder):
        report = read_json(folder / "report.json")
        bases = load_file(folder / "bases.safetensors")
        return Subspace(bases, {name: report[name]["kept"] for name in bases})
