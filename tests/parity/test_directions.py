"""SafeLoRA and AsFT: the alignment matrix, what is done with it, and the controls."""

from __future__ import annotations

import pytest
import torch

from cwac_lab.core.errors import LabError
from cwac_lab.defenses.interface import Context
from cwac_lab.defenses.literature.asft import AsFT, rotated
from cwac_lab.defenses.literature.safelora import SafeLoRA
from support import tiny
from support.by_hand import (
    SITES,
    assert_equal,
    base_of,
    context,
    plain,
    sft,
    trained,
)


def projected(ratio_of=None, *, mode, count, zero=False):
    """Return what SafeLoRA makes of plain fine-tuning."""
    found, start = plain(sft), tiny.model().state_dict()
    base, scored = base_of(start), []
    for name in SITES:
        direction, update = start[name] - base[name], found[name] - start[name]
        if mode == "exact":
            left = torch.linalg.eigh(direction @ direction.T).eigenvectors[:, -3:]
            matrix = left @ left.T
        else:
            matrix = direction @ direction.T / direction.square().sum().sqrt()
        kept = matrix @ update
        cosine = (kept * update).sum() / (kept.norm() * update.norm())
        scored.append((float(cosine), name, torch.zeros_like(kept) if zero else kept))
    for _, name, kept in sorted(scored, key=lambda entry: entry[0])[:count]:
        found[name] = start[name] + kept
    return found


@pytest.mark.parametrize(("mode", "zero"), [("as_released", False), ("exact", False), ("as_released", True)])
def test_safelora_projects_the_least_aligned_updates(mode, zero):
    defense = SafeLoRA(share=0.375, mode=mode, rank=3, control="zero" if zero else "none")
    assert_equal(trained(defense), projected(mode=mode, count=3, zero=zero))
    assert len(defense.summary()["safelora_projected"]) == 3


def test_safelora_passes_over_what_did_not_move():
    model, defense = tiny.model(), SafeLoRA(share=1.0)
    defense.prepare(context(model))
    with torch.no_grad():
        model.state_dict()[SITES[5]].add_(0.01)
    defense.after_training(model)
    assert set(defense.summary()["safelora_projected"]) == {SITES[5]}


def test_safelora_by_threshold():
    everything, nothing = SafeLoRA(threshold=1.0), SafeLoRA(threshold=-1.0)
    assert_equal(trained(everything), projected(mode="as_released", count=8))
    assert_equal(trained(nothing), plain(sft))


@pytest.mark.parametrize("architecture", ["qwen2", "gemma2"])
def test_directions_with_biases_and_grouped_heads(architecture):
    model = tiny.model(architecture)
    for defense in (SafeLoRA(share=1.0), AsFT(strength=1.0)):
        prepared = context(model)
        defense.prepare(prepared)
        assert {layer.linear.name for layer in defense._layers} == set(SITES)
        assert all(layer.matrix.shape == (len(layer.start),) * 2 for layer in defense._layers)


def test_a_layer_without_direction_is_an_error():
    model = tiny.model()
    start = model.state_dict()
    with pytest.raises(LabError, match=r"q_proj.weight is the same before and after alignment"):
        AsFT().prepare(Context(model, 0, tiny.chat(), start.__getitem__, base_weight=start.__getitem__))


def test_the_released_matrix_is_no_projector():
    """Its trace is ||V||_F, so its mean eigenvalue is ||V||_F / m; the exact one is idempotent of the asked rank."""
    model = tiny.model()
    released, exact = SafeLoRA(), SafeLoRA(mode="exact", rank=3)
    for defense in (released, exact):
        defense.prepare(context(model))
    base = base_of(model.state_dict())
    for layer in released._layers:
        torch.testing.assert_close(layer.matrix.trace(), (layer.start - base[layer.linear.name]).norm())
    for layer in exact._layers:
        torch.testing.assert_close(layer.matrix @ layer.matrix, layer.matrix, atol=1e-5, rtol=0)
        torch.testing.assert_close(layer.matrix.trace(), torch.tensor(3.0))


def test_controls_of_asft():
    matrix = torch.diag(torch.arange(5.0))
    random = rotated(matrix, torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.linalg.eigvalsh(random), torch.arange(5.0), atol=1e-5, rtol=0)
    assert (random - matrix).abs().max() > 0.1

    def plain_l2(model, start, batch, step):
        first = dict(start.named_parameters())
        moved = sum((p - first[name]).square().sum() for name, p in model.named_parameters() if name in SITES)
        return sft(model, start, batch, step) + 0.7 * moved

    assert_equal(trained(AsFT(strength=0.7, direction="none")), plain(plain_l2))


def test_asft_with_a_random_direction():
    """The penalty of each layer with its C turned by one fixed stream of rotations, layer after layer."""
    turned, source = {}, torch.Generator().manual_seed(0)
    first = tiny.model().state_dict()
    for name in SITES:
        direction = first[name] - base_of(first)[name]
        basis = torch.linalg.qr(torch.randn(2 * (len(direction),), generator=source)).Q
        turned[name] = basis @ (direction @ direction.T / direction.norm()) @ basis.T

    def formula(model, start, batch, step):
        total = sft(model, start, batch, step)
        for name, weight in model.named_parameters():
            if name in SITES:
                total = total + 0.7 * ((weight - first[name]) - turned[name] @ (weight - first[name])).square().sum()
        return total

    assert_equal(trained(AsFT(strength=0.7, direction="random")), plain(formula))
