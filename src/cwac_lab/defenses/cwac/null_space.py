"""What the safety subspace leaves free of linear layers, as factors that train (``tuning=null_space``)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from jaxtyping import Float
from torch import Tensor

from cwac_lab.defenses.cwac.subspace.spec import Subspace, SubspaceSpec
from cwac_lab.models import adapters
from cwac_lab.models.adapters import TARGETS, TuningConfig
from cwac_lab.models.sites import OF_EXPERTS, decoder_layers, linears, paths_in


def free_directions(model: Any, scope: str, subspace: Subspace, modules: str) -> dict[str, Float[Tensor, "d c"]]:
    """Return U, what is free of the inputs of each linear layer that gets factors, by the layer's name.

    Args:
        model: The model, without factors.
        scope: Scope of the subspace, a key of ``SCOPES``.
        subspace: The protected directions of its sites.
        modules: What gets factors, a key of ``TARGETS`` within the scope; experts are left out.
    """
    adapted = {
        layer.get_submodule(path)
        for layer in decoder_layers(model)
        for path in paths_in(layer, TARGETS[modules])
        if path not in OF_EXPERTS
    }
    free = cache(lambda site: subspace.spans[site].complement)  # layers that read one input share it
    found = (linear for linear in linears(model, scope) if linear.site.expert is None and linear.module in adapted)
    return {linear.name.removesuffix(".weight"): free(linear.site.name) for linear in found}


def free_share(model: Any, scope: str, subspace: Subspace) -> float:
    """Return which share of the weights of a scope is free, that is how many numbers ``tuning=null_space`` trains."""
    found = [(len(linear.weight), subspace.spans[linear.site.name]) for linear in linears(model, scope)]
    return sum(rows * (span.width - span.rank) for rows, span in found) / sum(rows * span.width for rows, span in found)


def attach(
    model: Any, tuning: TuningConfig, seed: int, spec: SubspaceSpec | None, subspace: Subspace | None
) -> Callable[[], object]:
    """Give a model the adapters that a run trains, in place, before its defence is prepared.

    Args:
        model: The model.
        tuning: What is trained.
        seed: Seed of factors that are drawn.
        spec: What the defence asks of the subspace, where it asks for one.
        subspace: What it is given.

    Returns:
        What ``adapters.attach`` does.
    """
    free = None
    if tuning.method == "null_space" and spec is not None and subspace is not None:
        free = free_directions(model, spec.modules, subspace, tuning.modules)
    return adapters.attach(model, tuning, seed, free)
