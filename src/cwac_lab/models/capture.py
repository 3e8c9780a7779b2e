"""Read activations: inputs of linear layers, outputs of decoder layers, and forwards that stop early."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cwac_lab.models.prefix import computed_alone, shared_length, states_after
from cwac_lab.models.sites import Site, decoder, decoder_layers, linears

SINK_RATIO = 10.0


@contextmanager
def site_inputs(
    model: Any, scope: str, receive: Callable[[Site, Tensor], None], only: Collection[str] | None = None
) -> Iterator[None]:
    """Call ``receive(site, x)`` with the input x of shape (B, T, d_in) of each site once per forward.

    ``only`` names the sites of the scope that are meant; all by default.
    """
    handles, seen = [], set()
    for matrix in linears(model, scope):
        site = matrix.site
        if site in seen or (only is not None and site.name not in only):
            continue
        seen.add(site)

        def hook(_: torch.nn.Module, args: tuple[Tensor, ...], site: Site = site) -> None:
            receive(site, args[0])

        handles.append(matrix.module.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def layer_states(model: Any, layers: Sequence[int]) -> Iterator[dict[int, list[Float[Tensor, "_ _ D"]]]]:
    """Collect what leaves decoder layers (0-based indices): by layer a tensor for every forward."""
    found: dict[int, list[Tensor]] = {index: [] for index in layers}
    handles = []
    for index in layers:

        def hook(_: torch.nn.Module, __: Any, output: Any, index: int = index) -> None:
            found[index].append(output[0] if isinstance(output, tuple) else output)

        handles.append(decoder_layers(model)[index].register_forward_hook(hook))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def truncated(model: Any, n_layers: int) -> Iterator[None]:
    """Let forwards of the decoder run its first ``n_layers`` layers only.

    The decoders of transformers loop over ``layers[: config.num_hidden_layers]``, so the config decides.
    """
    config = decoder(model).config
    full = config.num_hidden_layers
    config.num_hidden_layers = n_layers
    try:
        yield
    finally:
        config.num_hidden_layers = full


def layer_outputs(
    model: Any, layers: Sequence[int], input_ids: Int[Tensor, "B T"], attention_mask: Int[Tensor, "B T"]
) -> dict[int, Float[Tensor, "B T D"]]:
    """Return the residual stream after the given decoder layers; nothing after the last of them is computed.

    The opening that all rows share is computed once.

    Args:
        model: A causal language model.
        layers: Indices of decoder layers (0-based).
        input_ids: Token ids, shape (B, T), right-padded.
        attention_mask: 1 on real tokens, shape (B, T).

    Returns:
        For each layer the tensor of shape (B, T, D) that leaves it, inside the autograd graph if one is recorded.
    """
    shared = 0
    if not computed_alone(model):
        shared = shared_length(input_ids.tolist(), int(attention_mask.sum(1).min()) - 1)
    with layer_states(model, layers) as found, truncated(model, max(layers) + 1):
        states_after(model, input_ids, attention_mask, shared)
    # Of a shared opening the states come first, of one row for all.
    n_rows = len(input_ids)
    return {
        index: torch.cat([part.expand(n_rows, -1, -1) for part in parts], 1) if shared else parts[0]
        for index, parts in found.items()
    }


def without_sinks(x: Float[Tensor, "B T D"], mask: Int[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """Return where real tokens are no attention sinks: position 0 and norms above 10 times the median are left out.

    The median is taken over the real tokens of the batch. With right padding position 0 is the first token.
    """
    norms = x.detach().float().norm(dim=-1)
    real = mask.bool()
    keep = real & (norms <= SINK_RATIO * norms[real].median())
    keep[:, 0] = False
    return keep


def penalty_positions(
    x: Float[Tensor, "B T D"], mask: Int[Tensor, "B T"], positions: str, n_last: int
) -> Bool[Tensor, "B T"]:
    """Return which tokens of right-padded prompts are held: no sinks, and with ``last`` the final ``n_last`` only."""
    keep = without_sinks(x, mask)
    if positions == "last":
        from_end = mask.sum(dim=1, keepdim=True) - torch.arange(mask.shape[1], device=mask.device)
        keep &= (from_end >= 1) & (from_end <= n_last)
    return keep
