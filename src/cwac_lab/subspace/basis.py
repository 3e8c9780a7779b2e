"""Build, save and load the bases of the weight constraint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from cwac_lab import distributed
from cwac_lab.cache import read_json, write_json
from cwac_lab.data.batches import pad
from cwac_lab.linalg import leading_eigenbasis
from cwac_lab.models.capture import site_inputs, without_sinks
from cwac_lab.models.sites import Site, decoder


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


@torch.no_grad()
def second_moments(
    model: Any, prompts: Sequence[Sequence[int]], spec: SubspaceSpec, pad_id: int, batch_size: int = 16
) -> dict[str, Float[Tensor, "d d"]]:
    """Return ``C = X X^T`` of every site's input over the tokens of some prompts, streamed by batch.

    The processes of a run take a part of the prompts each.

    Args:
        model: The aligned model, in evaluation mode.
        prompts: Token ids of the reference prompts.
        spec: Scope of sites, tokens that count, and whether tokens are scaled to unit norm.
        pad_id: Id to pad with.
        batch_size: Prompts per forward.

    Returns:
        For every site's name its matrix of shape (d_in, d_in), accumulated in float64.
    """
    moments: dict[str, Tensor] = {}
    counted: Int[Tensor, "B T"]

    def receive(site: Site, x: Float[Tensor, "B T d"]) -> None:
        keep = without_sinks(x, counted) if spec.tokens == "no_sinks" else counted.bool()
        rows = x[keep].double()  # in float32, noise of the product would pass for directions in use
        if spec.normalize:
            rows = rows / rows.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
        product = rows.T @ rows
        moments[site.name] = moments[site.name] + product if site.name in moments else product

    ordered = sorted(prompts, key=len)
    batches = [ordered[begin : begin + batch_size] for begin in range(0, len(ordered), batch_size)]
    with site_inputs(model, spec.modules, receive):
        for batch in batches[distributed.rank() :: distributed.world()]:
            ids, mask = pad(batch, pad_id)
            counted = mask.to(model.device)
            decoder(model)(input_ids=ids.to(model.device), attention_mask=counted, use_cache=False)
    return distributed.summed(moments)


def build(model: Any, prompts: Sequence[Sequence[int]], spec: SubspaceSpec, pad_id: int, folder: Path) -> None:
    """Compute the bases of all sites and save them with a report of rank and share of variance kept."""
    bases, energy = {}, {}
    for name, moment in second_moments(model, prompts, spec, pad_id).items():
        width = moment.shape[0]
        rank = None if spec.rank is None else min(spec.rank, width)
        basis, energy[name] = leading_eigenbasis(moment, energy=spec.energy, rank=rank)
        bases[name] = basis.float().contiguous().cpu()
    save_file(bases, folder / "bases.safetensors")
    report = {
        name: {"rank": basis.shape[1], "width": basis.shape[0], "kept": energy[name]} for name, basis in bases.items()
    }
    write_json(folder / "report.json", report)


def load(folder: Path) -> Subspace:
    """Load what ``build`` saved."""
    report = read_json(folder / "report.json")
    return Subspace(load_file(folder / "bases.safetensors"), {name: entry["kept"] for name, entry in report.items()})
