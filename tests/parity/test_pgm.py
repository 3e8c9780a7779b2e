"""The projected gradient method: by numpy after every step, with factors, and beside the weight constraint."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from cwac_lab.core.errors import ConfigError
from cwac_lab.defenses.cwac.weight import WeightConstraint
from cwac_lab.defenses.interface import Composite, finish
from cwac_lab.defenses.literature.ema import EMA
from cwac_lab.defenses.literature.osf import OSF
from cwac_lab.defenses.literature.pgm import PGM
from cwac_lab.defenses.literature.safe_delta import SafeDelta
from cwac_lab.defenses.literature.safelora import SafeLoRA
from cwac_lab.defenses.together import check_together
from cwac_lab.models.adapters import attach
from support import tiny
from support.by_hand import assert_equal, context, plain, sft, trained
from support.defenses import WAYS
from support.held import LORA, train, weights
from support.held import start as begin

# About half of what rows, and matrices, move by in four steps.
RADII = {"mars": 0.2, "frobenius": 0.1}


def within(start, after, radius, norm):
    """Return a weight taken back to the radius, row by row or as a whole, in float64."""
    first, last = (each.double().numpy().reshape(len(each), -1) for each in (start, after))
    moved = last - first
    if norm == "frobenius":
        moved = moved / max(1.0, np.linalg.norm(moved) / radius)
    else:
        moved = np.array([row / max(1.0, np.linalg.norm(row, 1) / radius) for row in moved])
    return torch.from_numpy((first + moved).reshape(start.shape)).float()


@pytest.mark.parametrize("norm", RADII)
def test_what_moved_too_far_is_taken_back_after_every_step(norm):
    start = weights(tiny.model())

    def after(model, step):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(within(start[name], parameter, RADII[norm], norm))

    defense = PGM(radius=RADII[norm], norm=norm)
    assert_equal(trained(defense), plain(sft, after=after))
    assert 0.2 < defense.summary()["pgm_share_at_radius"] < 1


@pytest.mark.parametrize("norm", RADII)
def test_the_product_of_factors_is_within_the_radius(norm):
    start, radius = weights(tiny.model()), RADII[norm] / 4
    defense = PGM(radius=radius, norm=norm)
    found = weights(train(defense, tuning=LORA)[0])
    order = 2 if norm == "frobenius" else float("inf")
    moved = {}
    for name, value in found.items():
        update = (value - start[name]).double().numpy()
        if update.any():
            moved[name] = np.linalg.norm(update) if order == 2 else np.linalg.norm(update, order)
    assert len(moved) > 3
    assert max(moved.values()) == pytest.approx(radius, rel=1e-3)
    assert defense.summary()["pgm_share_at_radius"] > 0


def test_an_average_of_factors_is_within_the_radius_too():
    start = weights(tiny.model())
    found = weights(train(Composite({"ema": EMA(decay=0.5), "pgm": PGM(radius=0.01)}), tuning=LORA)[0])
    moved = [np.linalg.norm((value - start[name]).double().numpy(), float("inf")) for name, value in found.items()
             if "_proj" in name]  # fmt: skip
    assert max(moved) == pytest.approx(0.01, rel=1e-3)


def test_beside_the_weight_constraint_both_hold():
    start = weights(tiny.model())
    weight = WeightConstraint(energy=0.9, restore_every_n_steps=1)
    held = PGM(radius=0.02)
    found = weights(train(Composite({"pgm": held, "weight": weight}))[0])
    rows = torch.cat([(value - start[name]).abs().sum(1) for name, value in found.items() if "_proj" in name])
    assert weight.summary()["leak"] < 1e-4
    assert rows.max() == pytest.approx(0.02, rel=1e-4)
    assert 0.9 < float((rows[rows > 0] > 0.0199).float().mean()) <= 1
    # Of what is frozen there is no row.
    assert len(held._held) == len(weight._held)


def test_a_tail_is_not_slowed_beside_it():
    tail = WeightConstraint(energy=0.7, tail="slowed")
    with pytest.raises(ConfigError, match=r"constraint.weight.tail=slowed.*beside pgm"):
        check_together({"pgm": PGM(), "weight": tail})


@pytest.mark.parametrize(("norm", "leak"), [("frobenius", 1e-5), ("mars", None)])
def test_rows_are_not_scaled_beside_what_holds_outputs(norm, leak):
    osf, bounded = OSF(share=0.3), PGM(radius=0.02, norm=norm)
    if leak is None:
        with pytest.raises(ConfigError, match=r"constraint.pgm.norm=mars: accepted: frobenius beside osf"):
            check_together({"osf": osf, "pgm": bounded})
        return
    check_together({"osf": osf, "pgm": bounded})
    train(Composite({"osf": osf, "pgm": bounded}))
    assert osf.summary()["osf_leak"] < leak


@pytest.mark.parametrize("other", [SafeLoRA(share=0.5), SafeDelta(strength=50.0)], ids=["safelora", "safe_delta"])
def test_weights_are_not_changed_after_training_beside_it(other):
    with pytest.raises(ConfigError, match=r"constraint=\[other,pgm\]: accepted: one of other \| pgm: other changes"):
        check_together({"pgm": PGM(), "other": other})
    with pytest.raises(ConfigError, match=r"constraint=\[osf,other\]: accepted: one of osf \| other"):
        check_together({"osf": OSF(share=0.3), "other": other})


@pytest.mark.parametrize("way", ["lora", "qlora"])
def test_rows_at_the_radius_are_told_of_what_trained_and_not_of_what_merging_rounds(way):
    free, tight = PGM(radius=10.0), PGM(radius=1e-3)
    for defense in (free, tight):
        train(defense, **WAYS[way])
    assert (free.summary()["pgm_share_at_radius"], 1.0) == (0.0, pytest.approx(tight.summary()["pgm_share_at_radius"]))


def test_experts_with_factors_are_bounded_one_by_one_and_read_no_file():
    """Files hold experts under other names than the model."""
    model = begin("qwen3_moe", LORA)
    merge = attach(model, LORA, 0)
    defense = PGM(radius=0.01)
    prepared = replace(context(model), start_weight=lambda name: pytest.fail(name))
    defense.prepare(prepared)
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=source))
    before = [held.update().clone() for held in defense._held]
    defense.after_optimizer_step(0)
    for held, was in zip(defense._held, before, strict=True):
        now = held.update()
        torch.testing.assert_close(now.abs().sum(1), torch.full((len(now),), 0.01), atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(now / now.norm(dim=1, keepdim=True), was / was.norm(dim=1, keepdim=True))
    assert any(held.linear.site.expert for held in defense._held)
    finish(defense, model, merge)
    assert defense.summary()["pgm_share_at_radius"] == 1


def test_what_is_held_follows_a_model_whose_memory_is_replaced():
    """As that of a model that moves to another device."""
    model = tiny.model()
    start, defense = weights(model), PGM(radius=0.02)
    defense.prepare(context(model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.clone() + 1.0
    defense.settle(model)
    for name, value in weights(model).items():
        moved = (value - start[name]).reshape(len(value), -1).abs().sum(1)
        torch.testing.assert_close(moved, torch.full_like(moved, 0.02), atol=1e-5, rtol=1e-3)


def test_a_row_within_the_radius_stays_as_it_is_to_the_bit():
    model = tiny.model()
    defense = PGM(radius=1.0)
    defense.prepare(context(model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.view(len(parameter), -1)[0] += 1e-3
            parameter.view(len(parameter), -1)[-1] += 5.0
    moved = {name: value.clone() for name, value in weights(model).items()}
    defense.after_optimizer_step(0)
    for name, value in weights(model).items():
        assert torch.equal(value[:-1], moved[name][:-1])
        assert not torch.equal(value[-1], moved[name][-1])


@pytest.mark.parametrize(
    ("field", "value", "accepted"),
    [("radius", -1.0, r"\[0, inf\)"), ("norm", "spectral", r"mars \| frobenius")],
)
def test_a_field_that_is_out_of_range_is_named(field, value, accepted):
    with pytest.raises(ConfigError, match=f"{field}.*{value}.*{accepted}"):
        PGM(**{field: value})
