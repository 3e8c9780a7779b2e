"""The projected gradient method: by numpy after every step, with factors, and beside the weight constraint."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cwac_lab.core.errors import ConfigError
from cwac_lab.defenses.cwac.weight import WeightConstraint
from cwac_lab.defenses.interface import Composite, check_together
from cwac_lab.defenses.literature.ema import EMA
from cwac_lab.defenses.literature.pgm import PGM
from support import tiny
from support.by_hand import assert_equal, plain, sft, trained
from support.held import LORA, train, weights

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
    found = weights(train(Composite({"pgm": PGM(radius=0.02), "weight": weight}))[0])
    rows = torch.cat([(value - start[name]).abs().sum(1) for name, value in found.items() if "_proj" in name])
    assert weight.summary()["leak"] < 1e-4
    # What the weight constraint takes out of a row afterwards can lengthen it by absolute values, not by squares.
    assert 0 < rows.max() < 0.03


def test_a_tail_is_not_slowed_beside_it():
    tail = WeightConstraint(energy=0.7, tail="slowed")
    with pytest.raises(ConfigError, match=r"constraint.weight.tail=slowed.*beside pgm"):
        check_together({"pgm": PGM(), "weight": tail})


@pytest.mark.parametrize(
    ("field", "value", "accepted"),
    [("radius", -1.0, r"\[0, inf\)"), ("norm", "spectral", r"mars \| frobenius")],
)
def test_a_field_that_is_out_of_range_is_named(field, value, accepted):
    with pytest.raises(ConfigError, match=f"{field}.*{value}.*{accepted}"):
        PGM(**{field: value})
