"""Loss on held-out answers, against a loss that takes every row and token by itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cwac_lab.core.stats import mean_per
from cwac_lab.evaluation.heldout import _parts, losses, mean_loss
from cwac_lab.models.templates import Turn
from support import tiny
from support.held import ROWS


def test_the_loss_of_each_answer_whatever_stands_beside_it():
    model, chat = tiny.model(), tiny.chat()
    rows = [*ROWS[:4], ([Turn("user", "Hi"), Turn("assistant", "Hello!"), Turn("user", "And?")], "Well.")]
    found = losses(model, chat, rows, batch_size=2)
    for (asked, answer), (total, count) in zip(rows, found, strict=True):
        example = chat.encode(asked, answer)
        with torch.no_grad():
            said = model(torch.tensor([example.input_ids])).logits[0].double().log_softmax(-1)
        wanted = [-said[place - 1, label] for place, label in enumerate(example.labels) if label >= 0]
        assert count == len(wanted)
        assert total == pytest.approx(float(sum(wanted)), rel=1e-5)
    assert mean_loss([{"loss": list(loss)} for loss in found]).value == pytest.approx(
        sum(total for total, _ in found) / sum(count for _, count in found)
    )
    assert mean_loss([{"kind": "harmful"}]) is None


def test_a_forward_has_so_many_tokens_at_most():
    """With padding; an example that is longer than that goes alone."""
    assert _parts([700, 10, 900, 3000, 600, 2100], 64) == [[1, 4], [0, 2], [5], [3]]
    assert _parts([5, 5, 5], 2) == [[0, 1], [2]]
    assert _parts([], 2) == []


def test_the_interval_of_a_ratio_covers_as_often_as_it_says():
    draw = np.random.default_rng(0)
    counts = draw.integers(1, 30, (2000, 40))
    totals = counts * 1.5 + draw.normal(0, 1, counts.shape) * np.sqrt(counts)
    inside = [found.low <= 1.5 <= found.high for found in map(mean_per, totals, counts)]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.015)


def test_the_interval_of_equal_counts_is_students():
    from scipy import stats

    totals = [2.0, 4.0, 9.0, 5.0]
    found = mean_per(totals, [2] * 4)
    low, high = stats.t.interval(0.95, 3, np.mean(totals) / 2, stats.sem(np.asarray(totals) / 2))
    assert (found.value, found.low, found.high, found.n) == (2.5, pytest.approx(low), pytest.approx(high), 4)
    assert mean_per([3.0], [2]).low is None
    assert mean_per([], []).value is None
