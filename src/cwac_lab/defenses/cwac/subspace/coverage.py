"""How much of the inputs of texts lies in the protected directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cwac_lab.defenses.cwac.subspace.parts import NAMES, Parts
from cwac_lab.defenses.cwac.subspace.reading import Text, batched, fill
from cwac_lab.defenses.cwac.subspace.span import Span
from cwac_lab.defenses.cwac.subspace.spec import Subspace, SubspaceSpec
from cwac_lab.models.sites import Site, linears


class _Share:
    """Adds up, by part, what of the inputs of a site lies in a span, and all of it."""

    def __init__(self, span: Span, device: torch.device) -> None:
        self.span = span.to(device)
        self.within, self.whole = (torch.zeros(len(NAMES), dtype=torch.float64, device=device) for _ in range(2))

    def add(self, rows: Float[Tensor, "N d"], labels: Int[Tensor, " N"]) -> None:
        self.within.index_add_(0, labels, self.span.squares(rows))
        self.whole.index_add_(0, labels, rows.square().sum(1))


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

    Squares are summed over tokens, scaled as for the subspace itself, those of the opening as well, which are held to
    rounding with ``opening=held``; the mean is over the sites that read any. With ``opening=counted`` and all weights
    alike it is, of the prompts that the subspace was built from, the mean of ``Subspace.energy`` over these.

    Args:
        model: The aligned model, in evaluation mode.
        prompts: Token ids.
        subspace: The directions.
        spec: How they were built.
        pad_id: Id to pad with.
        batch_size: Prompts per forward.
    """
    shares = _shares(model, batched(prompts, None, batch_size), subspace, spec, pad_id).values()
    found = [float(share.within.sum() / share.whole.sum()) for share in shares if share.whole.sum()]
    return sum(found) / len(found) if found else 0.0


def _shares(
    model: Any, batches: Sequence[Sequence[Text]], subspace: Subspace, spec: SubspaceSpec, pad_id: int
) -> dict[Site, _Share]:
    sites = dict.fromkeys(matrix.site for matrix in linears(model, spec.modules))
    shares = {site: _Share(subspace.spans[site.name], model.device) for site in sites}
    fill(shares, model, batches, spec, pad_id)
    return shares


@torch.no_grad()
def covered_by_part(
    model: Any,
    texts: Sequence[Sequence[int]],
    parts: Sequence[Parts],
    subspace: Subspace,
    spec: SubspaceSpec,
    pad_id: int,
    batch_size: int = 16,
) -> dict[str, dict[str, tuple[float, float]]]:
    """Return how much of the inputs is held as ``covered`` does, by kind of site and part of the texts.

    Args:
        model: The aligned model, in evaluation mode.
        texts: Token ids.
        parts: Their parts.
        subspace: The directions.
        spec: How they were built; whether the opening counts there makes no difference here.
        pad_id: Id to pad with.
        batch_size: Texts per forward.

    Returns:
        By kind of site, then by part that any token is of: the mean over sites, and the least of any site.
    """
    shares = _shares(model, batched(texts, parts, batch_size), subspace, spec, pad_id)
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for kind in dict.fromkeys(site.kind for site in shares):
        of_kind = [share for site, share in shares.items() if site.kind == kind]
        for part, name in enumerate(NAMES):
            told = [float(each.within[part] / each.whole[part]) for each in of_kind if each.whole[part]]
            if told:
                found.setdefault(kind, {})[name] = sum(told) / len(told), min(told)
    return found
