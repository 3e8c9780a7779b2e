"""The opening that all rows of a batch share (system prompt, a task's instruction) is computed once, not once a row.

In a causal model the states of a token depend on the tokens before it only, so one row's keys and values of the opening
serve all rows; gradients flow back into them. Results are equal up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cwac_lab.core.errors import LabError
from cwac_lab.models.shards import is_sharded
from cwac_lab.models.sites import decoder, decoder_layers

# A shorter opening is not worth a forward of its own.
MIN_SHARED = 8


def shared_length(rows: Sequence[Sequence[int]], most: int) -> int:
    """Return how many leading tokens (at most ``most``) all rows have in common; 0 where it is not worth it."""
    if len(rows) < 2:
        return 0
    first = rows[0]
    limit = min(most, *map(len, rows))
    same = next((place for place in range(limit) if any(row[place] != first[place] for row in rows)), limit)
    return same if same >= MIN_SHARED else 0


def computed_alone(model: Any) -> bool:
    """Tell whether every row has to be computed in full.

    A checkpointed layer drops an opening's keys and values, and a sharded one is not gathered for their gradients.
    """
    layer = decoder_layers(model)[0]
    return bool(model.training and (layer.gradient_checkpointing or is_sharded(next(layer.parameters()))))


def opening_cache(model: Any, opening: Float[Tensor, "P D"], n_rows: int) -> Any:
    """Return the keys and values of P embedded tokens, repeated for a batch, inside the autograd graph if any.

    Raises:
        LabError: If the decoder does not fill a cache (gradient checkpointing drops it).
    """
    from transformers import DynamicCache

    # Without the config: all is kept, and the attention mask alone decides what a sliding layer sees.
    cache = DynamicCache()
    decoder(model)(inputs_embeds=opening[None], past_key_values=cache, use_cache=True)
    if cache.get_seq_length() != len(opening):
        raise LabError(f"{type(model).__name__} fills no key-value cache here (is gradient checkpointing on?)")
    cache.batch_repeat_interleave(n_rows)
    return cache


def states_after(
    model: Any, input_ids: Int[Tensor, "B T"], attention_mask: Int[Tensor, "B T"], shared: int
) -> Float[Tensor, "B T-shared D"]:
    """Return the last hidden states at the tokens after a shared opening.

    Args:
        model: A causal language model.
        input_ids: Token ids, right-padded; the first ``shared`` columns are alike in all rows.
        attention_mask: 1 on real tokens.
        shared: Length of the opening; 0 computes every row in full.
    """
    stack = decoder(model)
    if not shared:
        return stack(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    # Embedded in one call: the gradient of a lookup is as large as the table, whatever it looks up.
    embedded = model.get_input_embeddings()(torch.cat([input_ids[0, :shared], input_ids[:, shared:].flatten()]))
    cache = opening_cache(model, embedded[:shared], len(input_ids))
    return stack(
        inputs_embeds=embedded[shared:].unflatten(0, (len(input_ids), -1)),
        attention_mask=attention_mask,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
