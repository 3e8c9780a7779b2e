"""What the start computed, without a second model."""

from __future__ import annotations

import copy

import pytest
import torch

from cwac_lab.data.batches import collate
from cwac_lab.defenses.literature.start import StartLogits, StartModel
from cwac_lab.models.adapters import attach
from cwac_lab.models.answers import answer_logits
from cwac_lab.models.sites import linears
from support import tiny
from support.held import FULL, LORA, ROWS


def moved(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.sin(torch.arange(parameter.numel()).view_as(parameter)))
    return model


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
def test_logits_of_the_start_once_the_model_has_moved(architecture, tied):
    model, chat = tiny.model(architecture, tie_word_embeddings=tied), tiny.chat()
    start, rows = copy.deepcopy(model), [chat.encode(*row) for row in ROWS[:9]]
    kept = StartLogits(model, [*rows, *rows], chat.pad_id)
    moved(model)
    for chosen in ([4, 0, 8], [1], [7, 7, 2, 3]):  # other neighbours and other padding than when they were computed
        batch = collate([rows[row] for row in chosen], chat.pad_id)
        torch.testing.assert_close(kept.of(batch), answer_logits(start, batch)[0], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(kept.of(batch), answer_logits(model, batch)[0], atol=1e-2)


def test_a_head_that_does_not_train_is_not_copied():
    model, chat = tiny.model(tie_word_embeddings=False), tiny.chat()
    model.lm_head.requires_grad_(False)
    rows = [chat.encode(*row) for row in ROWS[:2]]
    assert StartLogits(model, rows, chat.pad_id)._head is model.lm_head
    model.lm_head.requires_grad_(True)
    assert StartLogits(model, rows, chat.pad_id)._head is not model.lm_head


@pytest.mark.parametrize("tuning", [FULL, LORA], ids=lambda tuning: tuning.method)
def test_the_start_model(tuning):
    ids = torch.arange(12)[None]
    model = tiny.model()
    expected = model(ids).logits
    attach(model, tuning, 0)
    first = next(linears(model, "attention"))
    for parameter in first.trained:
        parameter.requires_grad_(False)
    start = StartModel(model)
    moved(model)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with torch.no_grad(), start.model() as before:
        assert (before is model) == (tuning is LORA)
        assert torch.equal(before(ids).logits, expected)
    assert not torch.allclose(model(ids).logits, expected, atol=1e-2)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
