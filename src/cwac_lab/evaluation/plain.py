"""Perplexity on plain text that nothing was trained on: what a model keeps of language beside its task.

Forgetting is the rise of the loss over the start's on the same documents, as PEFT's method comparison calls it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from cwac_lab.core import distributed
from cwac_lab.core.stats import Rate, mean_per
from cwac_lab.data.plain_text import content
from cwac_lab.evaluation.heldout import Loss, summed
from cwac_lab.models.chat import IGNORED, ChatFormat, Encoded

# Larger exponents are no number.
_LARGEST = 700.0


def encoded(chat: ChatFormat, text: str) -> Encoded:
    """Return a document as it stands, without the chat template, cut to the longest conversation.

    It begins as the tokenizer begins a text. Loss is on all tokens but the first.
    """
    ids = chat.tokens(text)
    begin = chat.tokenizer.bos_token_id
    if begin is not None and list(chat.tokenizer(text)["input_ids"])[:1] == [begin] != ids[:1]:
        ids = [begin, *ids]
    cut, ids = len(ids) > chat.max_length, ids[: chat.max_length]
    return Encoded(ids, [IGNORED, *ids[1:]], cut)


def losses(model: Any, chat: ChatFormat, texts: Sequence[str], batch_size: int) -> list[Loss]:
    """Return for each document its cross-entropy in nats, summed over tokens, and the number of these.

    The processes of a run take a part each. The end of a document is not predicted.

    Args:
        model: A causal language model in evaluation mode.
        chat: Its chat format, of which the tokenizer and the limit count.
        texts: The documents.
        batch_size: Documents per forward at most.
    """
    examples = [encoded(chat, text) for text in texts]
    work = partial(summed, model, pad_id=chat.pad_id, batch_size=batch_size, told="loss on plain text, batches")
    return distributed.spread(examples, work)


def perplexity(found: Sequence[Loss]) -> Rate:
    """Return the perplexity over documents with a 95 % interval, that of the mean loss per token; n: documents.

    Without a value where a model computes no numbers, or too large ones.
    """
    loss = _mean([total for total, _ in found], found)
    value, low, high = (None if x is None or x > _LARGEST else math.exp(x) for x in (loss.value, loss.low, loss.high))
    return Rate(value, low, high, loss.n)


def forgetting(found: Sequence[Loss], start: Sequence[Loss]) -> Rate:
    """Return by how much the loss per token exceeds the start's on the same documents, in nats, with a 95 % interval.

    Differences are paired by document. Below zero the model predicts plain text better than the start.
    """
    return _mean([mine - theirs for (mine, _), (theirs, _) in zip(found, start, strict=True)], found)


def _mean(totals: Sequence[float], found: Sequence[Loss]) -> Rate:
    if not all(map(math.isfinite, totals)):
        return Rate(None, None, None, len(totals))
    return mean_per(totals, [count for _, count in found])


def told(found: Sequence[Loss], start: Sequence[Loss] | None, texts: Sequence[str]) -> dict[str, Any]:
    """Return the fields of a record: the model's perplexity, the start's and what was forgotten, and of which text.

    Args:
        found: Losses of the model.
        start: Those of its start; None where the model is the start.
        texts: The documents.
    """
    fields: dict[str, Any] = {"perplexity": perplexity(found).to_dict(), "plain_text": content(texts)}
    if start is not None:
        fields |= {"perplexity_start": perplexity(start).to_dict(), "forgetting": forgetting(found, start).to_dict()}
    return fields
