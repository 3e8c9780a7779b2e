"""Stage 1: greedy answers, batched, left-padded, with KV cache."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from cwac_lab.core.progress import Meter
from cwac_lab.data.batches import pad
from cwac_lab.models.chat import ChatFormat, Prompt
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
        thoughts: Whether it began with thoughts, which are left out; of thoughts that did not end no text is left.
    """

    text: str
    ended: bool
    first: int
    thoughts: bool = False


def read_answer(model: Any, chat: ChatFormat, forced: list[int], new: list[int]) -> Answer:
    """Return the answer that new tokens give, after those that were forced; it goes as far as the first end."""
    ends = set(end_ids(model, chat))
    length = next((place for place, token in enumerate(new) if token in ends), len(new))
    text, thoughts = chat.spoken([*forced, *new[:length]])
    return Answer(text, ended=length < len(new), first=new[0], thoughts=thoughts)


def end_ids(model: Any, chat: ChatFormat) -> list[int]:
    """Return what ends an answer: the end of turn that is taught, and the ends that config and tokenizer name.

    Those of ``generation_config.json`` are not asked: that file is in no key.
    """
    own = model.config.get_text_config().eos_token_id
    return chat.ends([] if own is None else [own] if isinstance(own, int) else own)


@contextmanager
def _greedy(model: Any, chat: ChatFormat, max_new_tokens: int, not_first: Collection[int]) -> Iterator[Any]:
    """Yield the settings of greedy answers, which are for the while the model's own too.

    What a setting leaves open, transformers would take from the model's ``generation_config.json``.
    """
    from transformers import GenerationConfig

    settings, own = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        begin_suppress_tokens=sorted(not_first) or None,
        pad_token_id=chat.pad_id,
        eos_token_id=end_ids(model, chat),
    ), model.generation_config  # fmt: skip
    model.generation_config = settings
    try:
        yield settings
    finally:
        model.generation_config = own


class _Streamer:
    """Told of every new token of a batch by transformers; the prompts come first."""

    def __init__(self, meter: Meter, share: float) -> None:
        self._meter, self._share, self._asked = meter, share, False

    def put(self, _: Any) -> None:
        if self._asked:
            self._meter.advance(self._share)
        self._asked = True

    def end(self) -> None:
        """Nothing is left to tell."""


def generate(
    model: Any,
    chat: ChatFormat,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    batch_size: int = 32,
    opening: str = "",
) -> list[str]:
    """Return the texts of ``answers``."""
    return [answer.text for answer in answers(model, chat, prompts, max_new_tokens, batch_size, opening=opening)]


@torch.inference_mode()
def answers(
    model: Any, chat: ChatFormat, prompts: Sequence[Prompt], max_new_tokens: int, batch_size: int = 32,
    *, not_first: Collection[int] = (), opening: str = "",
) -> list[Answer]:  # fmt: skip
    """Return the greedy answer to each prompt, in order, whatever the model's ``generation_config.json`` says.

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
    encoded = [[*chat.prompt_ids(prompt), *forced] for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda row: len(encoded[row]))
    found = [Answer("", ended=False, first=chat.end_id)] * len(prompts)
    batches = [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]
    with Meter("answering, prompts", len(prompts)) as meter:
        for rows in batches:
            ids, mask, cache = _opened(model, [encoded[row] for row in rows], chat.pad_id, max_new_tokens)
            told, begun = _Streamer(meter, len(rows) / max_new_tokens), meter.done
            with _greedy(model, chat, max_new_tokens, not_first) as settings:
                output = model.generate(
                    input_ids=ids, attention_mask=mask, past_key_values=cache, generation_config=settings, streamer=told
                )
            meter.done = begun + len(rows)
            for row, new in zip(rows, output[:, ids.shape[1] :].tolist(), strict=True):
                found[row] = read_answer(model, chat, forced, new)
    return found
