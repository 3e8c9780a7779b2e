"""Build, save and load the bases of the weight constraint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from cwac_lab.core import distributed, linalg
from cwac_lab.core.cache import digest, read_json, reading, write_json
from cwac_lab.core.progress import track
from cwac_lab.defenses.cwac.subspace.parts import Parts
from cwac_lab.defenses.cwac.subspace.reading import Text, batched, fill, passes
from cwac_lab.defenses.cwac.subspace.solvers import Routed, Solver, cheapest
from cwac_lab.defenses.cwac.subspace.span import Span
from cwac_lab.defenses.cwac.subspace.spec import Subspace, SubspaceSpec
from cwac_lab.models.sites import Site, linears

BASES, TAILS, SHARES = "bases.safetensors", "tails.safetensors", "shares.safetensors"


@dataclass(frozen=True)
class Directions:
    """The protected directions of a site's input, those behind them where these are asked for, how they were found.

    Attributes:
        basis: V, shape (d_in, k), orthonormal.
        span: The span of it, made in float64.
        kept: The share of the trace that it holds.
        solver: Name of the way.
        tail: T, shape (d_in, t), orthonormal and orthogonal to V.
        shares: The share of the trace that each of T holds, shape (t,).
    """

    basis: Float[Tensor, "d k"]
    span: Span
    kept: float
    solver: str
    tail: Float[Tensor, "d t"]
    shares: Float[Tensor, " t"]


def subspace_of(found: Iterable[tuple[str, Directions]]) -> Subspace:
    """Return the directions of sites that ``leading`` yields, as a defence is given them."""
    subspace = Subspace({}, {})
    for name, each in found:
        subspace.spans[name], subspace.energy[name] = each.span, each.kept
        if each.tail.shape[1]:
            subspace.tails[name], subspace.shares[name] = each.tail, each.shares
    return subspace


def drawn(beside: Float[Tensor, "d q"], name: str) -> Float[Tensor, "d p"]:
    """Return all p = d - q directions that are orthogonal to some, in float64, drawn at random for a site's name."""
    source = torch.Generator().manual_seed(int(digest(name)[:8], 16))
    width, q = beside.shape
    free = torch.randn(width, width - q, generator=source, dtype=torch.float64).to(beside.device)
    return torch.linalg.qr(torch.cat([beside, free], 1)).Q[:, q:]


class _Weighed:
    """Gives a solver the rows that count, times the root of what they weigh, without what lies in directions Q (d, q).

    What is held beside the solver's directions is known in the end: Q, and the share of the trace in it. As many of the
    directions ``random`` (d, d - q) take the place of the solver's, where there are any.
    """

    def __init__(
        self, solver: Solver, weights: Float[Tensor, " P"], beside: Float[Tensor, "d q"],
        random: Float[Tensor, "d p"] | None = None,
    ) -> None:  # fmt: skip
        self.solver, self.weights, self.beside, self.random = solver, weights.to(beside.device), beside, random
        self.sums = torch.zeros(2, dtype=torch.float64, device=beside.device)  # in Q, and in all
        self.along = torch.zeros(0 if random is None else random.shape[1], dtype=torch.float64, device=beside.device)

    def add(self, rows: Float[Tensor, "N d"], labels: Int[Tensor, " N"]) -> None:
        weights = self.weights[labels]
        rows = rows[weights > 0] * weights[weights > 0].sqrt()[:, None]
        if self.beside.shape[1]:
            within = rows @ self.beside
            self.sums += torch.stack([within.square().sum(), rows.square().sum()])
            rows = rows - within @ self.beside.T
        if self.random is not None:
            self.along += (rows @ self.random).square().sum(0)
        self.solver.add(rows)

    def solve(
        self, energy: float | None, rank: int | None, reach: float | None, *, ordered: bool = False
    ) -> Directions:
        """Return the directions, Q first, and as the tail those up to the share of the trace that ``reach`` is."""
        within, whole = distributed.summed(self.sums).tolist() if self.beside.shape[1] else (0.0, 1.0)
        rest = whole - within

        def of_rest(share: float) -> float:
            """Return the share of the other directions that makes up a share of all."""
            return min((share * whole - within) / rest, 1.0) if rest > 0 else 0.0

        if reach is None:
            least = None if energy is None else of_rest(energy)
            basis, shares = self._solved(least, rank)
            n = len(shares)
        else:
            basis, shares = self._solved(of_rest(reach), None)
            if rank is not None and rank > len(shares):
                basis, shares = self._solved(None, rank)
            n = rank or 0
            if energy is not None:
                n = linalg.reaching(shares, of_rest(energy)) if of_rest(energy) > 0 else 0
            n = min(n, len(shares))
        if self.random is not None:
            basis, found = self.random[:, :n], distributed.summed(self.along)
            shares = found[:n] / found.sum().clamp_min(torch.finfo(torch.float64).tiny)
        shares = shares * (rest / whole if whole else 0.0)
        q = self.beside.shape[1]
        if q:
            basis = torch.linalg.qr(torch.cat([self.beside, basis], 1)).Q
        kept = float(shares[:n].sum()) + (within / whole if whole else 0.0)
        span = Span.of(basis[:, : q + n], ordered=ordered)
        return Directions(basis[:, : q + n], span, kept, self.solver.name, basis[:, q + n :], shares[n:])

    def _solved(self, energy: float | None, rank: int | None) -> tuple[Float[Tensor, "d k"], Float[Tensor, " k"]]:
        """Return the solver's directions, none where none of the energy is left to them."""
        return self.solver.solve(energy, rank) if energy is None or energy > 0 else self.solver.solve(None, 0)


class _Kept:
    """Keeps the rows of the opening."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.rows = [torch.zeros(0, width, dtype=torch.float64, device=device)]

    def add(self, rows: Float[Tensor, "N d"], labels: Int[Tensor, " N"]) -> None:
        self.rows.append(rows)


def _beside(
    sites: Mapping[Site, int], model: Any, texts: Sequence[Text], spec: SubspaceSpec, pad_id: int
) -> dict[Site, Float[Tensor, "d q"]]:
    """Return, by site, the directions of the openings; without columns where these count as other tokens do."""
    none = {site: torch.zeros(width, 0, dtype=torch.float64, device=model.device) for site, width in sites.items()}
    openings = dict.fromkeys(tuple(ids[: parts.opening]) for ids, parts in texts if parts.opening)
    if spec.opening == "counted" or not openings:
        return none
    held = {site: _Kept(width, model.device) for site, width in sites.items()}
    fill(held, model, [[(ids, Parts(len(ids), len(ids), len(ids)))] for ids in openings], spec, pad_id)
    rows = {site: torch.cat(kept.rows) for site, kept in held.items()}
    return {
        site: linalg.leading_directions(found, energy=1.0)[0] if len(found) else none[site]
        for site, found in rows.items()
    }


@torch.no_grad()
def leading(
    model: Any, prompts: Sequence[Sequence[int]], spec: SubspaceSpec, pad_id: int, batch_size: int = 16,
    parts: Sequence[Parts] | None = None,
) -> Iterator[tuple[str, Directions]]:  # fmt: skip
    """Yield the leading directions of every site's input over the tokens of some prompts, streamed by batch.

    The processes of a run take a part of the prompts each. Where all sites at once would hold too much, the prompts are
    run several times, each as far as the last layer that is needed.

    Args:
        model: The aligned model, in evaluation mode.
        prompts: Token ids of the reference prompts.
        spec: Scope of sites, tokens that count, whether they are scaled to unit norm, and how many directions.
        pad_id: Id to pad with.
        batch_size: Prompts per forward.
        parts: The parts of each prompt; by default as of prompts in one form (``parts_of``).
    """
    matrices = {matrix.site: matrix for matrix in linears(model, spec.modules)}
    widths = {site: matrix.width for site, matrix in matrices.items()}
    n = sum(map(len, prompts))
    ranks = {site: None if spec.rank is None else min(spec.rank, width) for site, width in widths.items()}
    fixed = ranks if spec.reach is None else dict.fromkeys(widths)
    kinds: dict[Site, type[Solver]] = {
        site: cheapest(n, width, fixed[site]) if site.expert is None else Routed for site, width in widths.items()
    }
    read = {site: round(n * matrix.share) for site, matrix in matrices.items()}
    batches = batched(prompts, parts, batch_size)
    texts = [text for batch in batches for text in batch]
    extra = 16 if spec.directions == "random" else 0  # bytes a number of what is drawn, and of its factors for a moment
    sizes = {site: kinds[site].size(read[site], width) + extra * width**2 for site, width in widths.items()}
    for group in passes(sizes):
        beside = _beside({site: widths[site] for site in group}, model, texts, spec, pad_id)
        held = {
            site: _Weighed(
                kinds[site](widths[site], model.device), spec.weights, beside[site],
                drawn(beside[site], site.name) if spec.directions == "random" else None,
            )
            for site in group
        }  # fmt: skip
        del beside
        fill(held, model, batches[distributed.rank() :: distributed.world()], spec, pad_id)
        for site in track(group, "finding the directions of layers' inputs, sites"):
            found = held.pop(site).solve(spec.energy_at(site.kind), ranks[site], spec.reach, ordered=spec.ordered)
            each = {name: getattr(found, name).float().contiguous() for name in ("basis", "tail", "shares")}
            yield site.name, replace(found, span=found.span.to(torch.float32), **each)


def build(
    model: Any, prompts: Sequence[Sequence[int]], parts: Sequence[Parts], spec: SubspaceSpec, pad_id: int, folder: Path
) -> None:
    """Compute the spans of all sites and save them with a report of rank, share of variance kept and solver."""
    solvers: dict[str, str] = {}

    def noted() -> Iterator[tuple[str, Directions]]:
        for name, each in leading(model, prompts, spec, pad_id, parts=parts):
            solvers[name] = each.solver
            yield name, each

    subspace = subspace_of(noted())
    save_file({name: span.columns.cpu().contiguous() for name, span in subspace.spans.items()}, folder / BASES)
    if subspace.tails:
        for what, file in ((subspace.tails, TAILS), (subspace.shares, SHARES)):
            save_file({name: value.cpu() for name, value in what.items()}, folder / file)
    report = {
        name: {
            "rank": span.rank, "width": span.width, "kept": subspace.energy[name], "solver": solvers[name],
            "complement": span.free,
        }
        for name, span in subspace.spans.items()
    }  # fmt: skip
    write_json(folder / "report.json", report)


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
        columns = load_file(folder / BASES)
        spans = {name: Span(each, bool(report[name]["complement"])) for name, each in columns.items()}
        tails, shares = (load_file(folder / file) if (folder / file).is_file() else {} for file in (TAILS, SHARES))
        return Subspace(spans, {name: report[name]["kept"] for name in spans}, tails, shares)
