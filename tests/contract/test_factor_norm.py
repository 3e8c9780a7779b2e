"""The norm that LoRA's factors begin with under the weight constraint: what is left of it, or what was drawn."""

from __future__ import annotations

import pytest
import torch

from cwac_lab.defenses.cwac.tail import slowing
from cwac_lab.defenses.cwac.weight import WeightConstraint
from cwac_lab.models.adapters import attach
from cwac_lab.models.sites import linears, rights
from support import tiny
from support.held import LORA, ROWS, context, train, weights
from support.held import start as start_of


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_what_is_left_of_a_factor_has_the_norm_that_it_was_drawn_with(architecture):
    model = start_of(architecture, LORA)
    defense = WeightConstraint(energy=0.9, factor_norm="kept")
    prepared = context(model, defense)
    attach(model, LORA, 0)
    drawn = {name: value.clone() for name, value in model.named_parameters() if "lora_A" in name}
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before = model(ids).logits
    defense.prepare(prepared)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
    seen = 0
    for held in defense._held:
        (key,) = held.linear.adapter.active_adapters
        used, span = held.linear.factors()[1], prepared.subspace.spans[held.linear.site.name]
        first = next(value for name, value in drawn.items() if held.linear.adapter.lora_A[key] is owner(model, name))
        expert = held.linear.site.expert
        was = (first if expert is None else rights(first, held.linear.module.num_experts)[expert]).norm(dim=1)
        torch.testing.assert_close(used.norm(dim=1), was, atol=1e-5, rtol=1e-4)
        assert (used @ span.basis).norm() < 1e-5 * used.norm() or not span.rank
        seen += expert is not None if architecture == "qwen3_moe" else 1
    assert seen


def owner(model, name):
    return model.get_submodule(name.rpartition(".")[0].replace(".parametrizations.weight", ""))


def test_a_factor_that_keeps_its_norm_trains_more_and_leaks_nothing():
    moved = {}
    for norm in ("projected", "kept"):
        defense = WeightConstraint(energy=0.99, factor_norm=norm)
        model, prepared = train(defense, tuning=LORA, rows=ROWS)
        assert defense.summary()["leak"] < 1e-5
        moved[norm] = sum(
            float((value - prepared.start_weight(name)).square().sum()) for name, value in weights(model).items()
        )
    assert moved["kept"] > 1.5 * moved["projected"]


def test_a_factor_of_which_nothing_is_left_stays_zero():
    model = start_of("llama", LORA)
    defense = WeightConstraint(energy=None, rank=10**6, factor_norm="kept")
    prepared = context(model, defense)
    attach(model, LORA, 0)
    defense.prepare(prepared)
    assert all(not held.linear.factors()[1].any() for held in defense._held)


def test_beside_a_slowed_tail_a_factor_keeps_its_norm_and_is_slowed_once():
    model = tiny.model()
    defense = WeightConstraint(energy=0.7, tail="slowed", tail_strength=1.0, factor_norm="kept")
    prepared = context(model, defense)
    attach(model, LORA, 0)
    drawn = {linear.name: linear.factors()[1].clone() for linear in linears(model, "all_linear")}
    defense.prepare(prepared)
    for linear in linears(model, "all_linear"):
        name, used, was = linear.site.name, linear.factors()[1], drawn[linear.name]
        v, t = prepared.subspace.spans[name].basis, prepared.subspace.tails[name]
        once = was @ (
            torch.eye(len(v)) - v @ v.T - t @ torch.diag(slowing(prepared.subspace.shares[name], len(v), 1.0)) @ t.T
        )
        torch.testing.assert_close(
            used, once * was.norm(dim=1, keepdim=True) / once.norm(dim=1, keepdim=True), atol=1e-4, rtol=1e-3
        )
