"""Stage 1: greedy answers, batched, left-padded, with KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cwac_lab.data.batches import pad
from cwac_lab.models.chat import ChatFormat


@torch.inference_mode()
def generate(
    model: Any, chat: ChatFormat, prompts: Sequence[str], max_new_tokens: int, batch_size: int = 32
) -> list[str]:
    """Return the greedy answer to each prompt, in order.

    Prompts of similar length share a batch. Left padding with position ids that start at the first real token gives
    the outputs of batch size 1 (up to ties in floating point).

    Args:
        model: A causal language model in evaluation mode.
        chat: Its chat format.
        prompts: User messages.
        max_new_tokens: Longest answer.
        batch_size: Prompts per batch.
    """
    encoded = [chat.prompt_ids(prompt)[-chat.max_length :] for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda row: len(encoded[row]))
    answers = [""] * len(prompts)
    for begin in range(0, len(order), batch_size):
        rows = order[begin : begin + batch_size]
        ids, mask = pad([encoded[row] for row in rows], chat.pad_id, left=True)
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            repetition_penalty=1.0,
            pad_token_id=chat.pad_id,
            eos_token_id=chat.end_id,
        )
        for row, new in zip(rows, output[:, ids.shape[1] :].tolist(), strict=True):
            end = new.index(chat.end_id) if chat.end_id in new else len(new)
            answers[row] = chat.decode(new[:end])
    return answers
