"""The loss of the alignment stage, against one that takes every token by itself."""

from __future__ import annotations

import pytest
import torch

from cwac_lab.data.batches import collate
from cwac_lab.models.chat import Encoded
from cwac_lab.run.distillation import Distillation
from support import tiny
from support.held import ROWS


def by_token(model, start, example, own):
    """Return the losses of a row's answer tokens: minus the log-probability, or the sum of p_0 log(p_0 / p)."""
    ids = torch.tensor([example.input_ids])
    now, before = (each(ids).logits[0].double().softmax(-1) for each in (model, start))
    losses = []
    for place, label in enumerate(example.labels):
        if label >= 0:
            p, p0 = now[place - 1], before[place - 1]
            losses.append((p0 * (p0 / p).log()).sum() if own and int(p0.argmax()) == label else -p[label].log())
    return losses


def greedy(model, row, length=4):
    """Return a row with its answer replaced by a model's greedy one."""
    first = sum(label < 0 for label in row.labels)
    ids = row.input_ids[:first]
    for _ in range(length):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return Encoded(ids, [-100] * first + ids[first:])


@pytest.mark.parametrize("chosen", [[0, 1, 5, 6], [5, 7], [2, 3]], ids=["both", "own answers", "refusals"])
def test_refusals_are_learned_and_own_answers_kept(chosen):
    model, start, chat = tiny.model(), tiny.model(), tiny.chat()
    rows = [chat.encode(*row) for row in ROWS[:8]]
    rows[5] = greedy(start, rows[5])
    own = rows[5:]
    loss = Distillation(model, chat.pad_id, own)
    loss.begin(1, rows)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.sin(torch.arange(parameter.numel()).view_as(parameter)))
    found = loss.task_loss(model, collate([rows[row] for row in chosen], chat.pad_id), 0)
    expected = [each for row in chosen for each in by_token(model, start, rows[row], own=row >= 5)]
    assert found.item() == pytest.approx((sum(expected) / len(expected)).item(), rel=1e-5)
    found.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_an_original_that_has_not_moved_loses_nothing_on_what_it_says_itself():
    model, chat = tiny.model(), tiny.chat()
    own = greedy(model, chat.encode(*ROWS[0]))
    loss = Distillation(model, chat.pad_id, [own])
    loss.begin(1, [own])
    assert loss.task_loss(model, collate([own], chat.pad_id), 0).item() == pytest.approx(0, abs=1e-5)
