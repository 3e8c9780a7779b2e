"""Stage 1: greedy answers, batched, left-padded, with KV cache."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from cwac_lab.data.batches import pad
from cwac_lab.models.chat import ChatFormat
from cwac_lab.models.prefix import opening_cache, shared_length
from cwac_lab.models.sites import decoder


def _opened(
    model: Any, rows: list[list[int]], pad_id: int, max_new_tokens: int
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"], Any]:
    """Return ids and mask, padded between the shared opening and the rest, and the opening's cache (None if none)."""
    shared = shared_length(rows, min(map(len, rows)) - 1)
    window = getattr(decoder(model).config, "sliding_window", None)
    if window is not None and max(map(len, rows)) + max_new_tokens > window:
        shared = 0  # a window counts padding as distance
    ids, mask = pad([row[shared:] for row in rows], pad_id, left=True)
    ids, mask = ids.to(model.device), mask.to(model.device)
    if not shared:
        return ids, mask, None
    opening = torch.tensor(rows[0][:shared], device=model.device)
    ids = torch.cat([opening.expand(len(rows), -1), ids], dim=1)
    mask = torch.cat([mask.new_ones(len(rows), shared), mask], dim=1)
    return ids, mask, opening_cache(model, model.get_input_embeddings()(opening), len(rows))


@dataclass(frozen=True)
class Answer:
    """A generated answer.

    Attributes:
        text: What was said.
        ended: Whether the model ended it, or the limit of tokens did.
        first: Id of its first token.
    """

    text: str
    ended: bool
    first: int


def generate(
    model: Any, chat: ChatFormat, prompts: Sequence[str], max_new_tokens: int, batch_size: int = 32, opening: str = ""
) -> list[str]:
    """Return the texts of ``answers``."""
    return [answer.text for answer in answers(model, chat, prompts, max_new_tokens, batch_size, opening=opening)]


@torch.inference_mode()
def answers(
    model: Any, chat: ChatFormat, prompts: Sequence[str], max_new_tokens: int, batch_size: int = 32,
    *, not_first: Collection[int] = (), opening: str = "",
) -> list[Answer]:  # fmt: skip
    """Return the greedy answer to each prompt, in order.

    Prompts of similar length share a batch, and the opening that all of a batch share is computed once. What follows it
    is padded on the left, with position ids that count real tokens only, which gives the outputs of batch size 1 (up to
    ties in floating point).

    Args:
        model: A causal language model in evaluation mode.
        chat: Its chat format.
        prompts: User messages.
        max_new_tokens: Longest answer.
        batch_size: Prompts per batch.
        not_first: Token ids that no answer may open with.
        opening: What every answer is made to begin with; part of its text, not of ``max_new_tokens``.
    """
    forced = chat.tokens(opening)
    encoded = [[*chat.prompt_ids(prompt)[-chat.max_length :], *forced] for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda row: len(encoded[row]))
    found = [Answer("", ended=False, first=chat.end_id)] * len(prompts)
    for begin in range(0, len(order), batch_size):
        rows = order[begin : begin + batch_size]
        ids, mask, cache = _opened(model, [encoded[row] for row in rows], chat.pad_id, max_new_tokens)
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            cache_implementation=None,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            repetition_penalty=1.0,
            begin_suppress_tokens=sorted(not_first) or None,
            pad_token_id=chat.pad_id,
            eos_token_id=chat.end_id,
        )
        for row, new in zip(rows, output[:, ids.shape[1] :].tolist(), strict=True):
            end = new.index(chat.end_id) if chat.end_id in new else len(new)
            found[row] = Answer(chat.decode([*forced, *new[:end]]), ended=end < len(new), first=new[0])
    return found
