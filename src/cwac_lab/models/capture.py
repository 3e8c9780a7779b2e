"""Read activations: inputs of linear layers and of experts, outputs of decoder layers, and forwards that stop early."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.hooks import RemovableHandle

from cwac_lab.models.prefix import computed_alone, shared_length, states_after
from cwac_lab.models.sites import Matrix, Site, decoder, decoder_layers, linears

SINK_RATIO = 10.0


# Takes a site and its input x of shape (B, T, d); of an expert also a mask (B, T) of the tokens it reads, and x holds
# its input at these only.
Receive = Callable[..., None]


@contextmanager
def site_inputs(model: Any, scope: str, receive: Receive, only: Collection[str] | None = None) -> Iterator[None]:
    """Call ``receive(site, x)`` with the input x of shape (B, T, d_in) of each site once per forward.

    For an expert it is ``receive(site, x, read)``, with a mask (B, T) of the tokens that are routed to it; not at all
    where none are. ``only`` names the sites of the scope that are meant; all by default.
    """
    handles, seen = [], set()
    routed: dict[int, list[Matrix]] = {}
    for matrix in linears(model, scope):
        site = matrix.site
        if site in seen or (only is not None and site.name not in only):
            continue
        seen.add(site)
        if site.expert is not None:
            routed.setdefault(site.layer, []).append(matrix)
            continue

        def hook(_: torch.nn.Module, args: tuple[Tensor, ...], site: Site = site) -> None:
            receive(site, args[0])

        handles.append(matrix.module.register_forward_pre_hook(hook))
    for layer, matrices in routed.items():
        handles += _expert_inputs(decoder_layers(model)[layer].mlp, matrices, receive)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _expert_inputs(block: Any, matrices: Sequence[Matrix], receive: Receive) -> list[RemovableHandle]:
    """Have a mixture of experts tell what its experts read.

    The block is given states (B, T, d), the experts all N tokens of them in a row, (N, d), and which k experts each
    token goes to, (N, k). What a ``down_proj`` reads is computed here as the experts compute it.
    """
    experts, shape = matrices[0].module, [0, 0]

    def shaped(_: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        shape[:] = args[0].shape[:2]

    def hook(_: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        x, chosen = args[0], args[1]
        for matrix in matrices:
            expert = matrix.site.expert
            assert expert is not None
            read = chosen.eq(expert).any(-1)
            if not read.any():
                continue
            given = x
            if matrix.site.kind == "ffn_out":
                hidden = experts._apply_gate(linear(x[read], experts.gate_up_proj[expert]))
                given = hidden.new_zeros(len(x), hidden.shape[-1])
                given[read] = hidden
            receive(matrix.site, given.view(*shape, -1), read.view(*shape))

    return [block.register_forward_pre_hook(shaped), experts.register_forward_pre_hook(hook)]


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

    The decoders of transformers loop over ``layers[: config.num_hidden_layers]``, so the config decides; GPT-2's goes
    through all of ``h``, so this is what is made shorter.
    """
    stack = decoder(model)
    owner, name = (stack.config, "num_hidden_layers") if hasattr(stack, "layers") else (stack, "h")
    full = getattr(owner, name)
    setattr(owner, name, n_layers if name != "h" else full[:n_layers])
    try:
        yield
    finally:
        setattr(owner, name, full)


@contextmanager
def without_dropout(model: Any) -> Iterator[None]:
    """Let a model compute without dropout, where it has any, as GPT-2 has: what drops out is no drift."""
    dropping = model.training and any(isinstance(each, torch.nn.Dropout) and each.p for each in model.modules())
    if dropping:
        model.eval()
    try:
        yield
    finally:
        if dropping:
            model.train()


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
    with layer_states(model, layers) as found, truncated(model, max(layers) + 1), without_dropout(model):
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
