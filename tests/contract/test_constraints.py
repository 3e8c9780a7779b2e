"""The two constraints of CWAC on tiny models: what they hold exactly, and what their terms are."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from cwac_lab.core.errors import ConfigError
from cwac_lab.defenses.cwac import activation
from cwac_lab.defenses.cwac.activation import ActivationConstraint
from cwac_lab.defenses.cwac.subspace.basis import leading
from cwac_lab.defenses.cwac.weight import WeightConstraint
from cwac_lab.defenses.interface import Defense
from cwac_lab.training.loop import fit
from cwac_lab.training.settings import TrainerConfig
from support import tiny
from support.cover import some
from support.held import PROMPTS, ROWS, context, train


@pytest.mark.parametrize("architecture", some(tiny.ARCHITECTURES, "qwen2", "gemma2"))
def test_update_projection_leaks_nothing_under_adamw_with_weight_decay(architecture):
    leaks = {}
    for projection in ("update", "both", "gradient"):
        defense = WeightConstraint(energy=0.9, projection=projection)
        train(defense, architecture=architecture, rows=ROWS * 4, learning_rate=1e-3)  # 24 steps
        leaks[projection] = defense.summary()["leak"]
    assert max(leaks["update"], leaks["both"]) < 1e-5
    assert leaks["gradient"] > 1000 * leaks["update"]


@pytest.mark.parametrize(("projection", "times"), [("update", 18), ("both", 4)])
def test_rarer_restoring_leaks_nothing_at_the_end(projection, times):
    defense = WeightConstraint(energy=0.9, projection=projection, restore_every_n_steps=4)
    seen, restore = [], defense._restore
    defense._restore = lambda: (seen.append(1), restore())
    train(defense, rows=ROWS, epochs=3, learning_rate=1e-3)  # 18 steps
    assert len(seen) == times + 1
    assert defense.summary()["leak"] < 1e-5


def test_gradients_projected_off_some_directions_leave_no_update_along_any():
    removed = {}
    for share in (1.0, 0.5):
        defense = WeightConstraint(energy=0.9, gradient_share=share, restore_every_n_steps=2)
        taken = removed.setdefault(share, [])
        defense._restore = lambda of=defense, taken=taken: (WeightConstraint._restore(of), taken.append(of._removed))
        _, prepared = train(defense, rows=ROWS * 3, learning_rate=1e-3)
        for held in defense._held:
            basis = prepared.subspace.spans[held.linear.site.name].basis
            assert held.span.rank == basis.shape[1]
        assert defense.summary()["leak"] < 1e-5
    assert all(half > whole for half, whole in zip(removed[0.5][:-1], removed[1.0][:-1], strict=True))


@pytest.mark.parametrize("energy", [0.9, 0.9999])
def test_the_leak_between_restorations_is_that_by_the_protected_directions(energy):
    """Also where it is computed by the directions that are free, because these are fewer."""
    defense = WeightConstraint(energy=energy, restore_every_n_steps=100)
    told = []
    defense.settle = lambda _: told.append(defense.leak())  # before what leaked is taken out
    _, prepared = train(defense, rows=ROWS, learning_rate=1e-3)
    chat = tiny.chat()
    asked = [chat.prompt_ids(prompt) for prompt in PROMPTS]
    built = dict(leading(tiny.model(), asked, defense.requirements.subspace, chat.pad_id))
    sums = torch.zeros(2, dtype=torch.float64)
    for held in defense._held:
        moved = (held.linear.weight - prepared.start_weight(held.linear.name)).detach().double()
        along = moved @ built[held.linear.site.name].basis.double()
        sums += torch.stack([along.square().sum(), moved.square().sum()])
    assert told[-1] == pytest.approx(float((sums[0] / sums[1]).sqrt()), rel=1e-5)
    assert told[-1] > 1e-2
    assert any(held.start is not None for held in defense._held) or energy < 0.99


def test_a_layer_that_is_frozen_does_not_take_the_projection_from_those_beside_it():
    """q, k and v read one input, and their projection is built once."""
    model, defense = tiny.model(), WeightConstraint(energy=None, rank=28, opening="counted")
    for layer in model.get_decoder().layers:
        layer.self_attn.q_proj.requires_grad_(False)
    prepared = context(model, defense)
    defense.prepare(prepared)
    ids = torch.arange(40).view(2, 20)
    model(ids, labels=ids).loss.backward()
    for held in defense._held:
        if held.linear.site.kind == "attn_in":
            assert (held.linear.parameter.grad is None) == held.linear.name.endswith("q_proj.weight")
        if (gradient := held.linear.parameter.grad) is not None:
            basis = prepared.subspace.spans[held.linear.site.name].basis
            assert len(basis) / 2 < basis.shape[1] < len(basis)
            assert 0 < float((gradient @ basis).norm()) < 1e-5 * float(gradient.norm())


def test_the_leading_directions_are_those_that_gradients_are_projected_off():
    model, defense = tiny.model(), WeightConstraint(energy=0.9, gradient_share=0.5)
    prepared = context(model, defense)
    defense.prepare(prepared)
    for held in defense._held:
        basis = prepared.subspace.spans[held.linear.site.name].basis
        leading = held.linear.module.projection.span.basis
        assert leading.shape[1] == math.ceil(basis.shape[1] / 2) < basis.shape[1]
        torch.testing.assert_close(leading, basis[:, : leading.shape[1]])


@pytest.mark.parametrize("projection", ["gradient", "update"])
def test_some_directions_only_with_both_projections(projection):
    with pytest.raises(ConfigError, match=r"gradient_share=0\.5: accepted: 1 with a projection other than both"):
        WeightConstraint(projection=projection, gradient_share=0.5)


def test_reference_prompts_are_looked_at_alone_though_computed_together(monkeypatch):
    """Their positions and latents do not depend on which prompts share a forward, and keep the order of the prompts."""
    chat = tiny.chat()
    prompts = [
        chat.prompt_ids(f"please plan a trip and then write a poem about {what}") for what in ["a", "bread", "is", "a"]
    ]
    prompts += [chat.prompt_ids("how?")]
    taken = {}
    for together in (1, 2, 16):
        monkeypatch.setattr(activation, "TOGETHER", together)
        model, defense = tiny.lively("llama"), ActivationConstraint(n_latents=6, depths=[0.1, 0.9], positions="all")
        defense.prepare(context(model, defense, prompts))
        taken[together] = defense
    for together in (2, 16):
        for name in ("_held", "_start"):
            for found, expected in zip(getattr(taken[together], name), getattr(taken[1], name), strict=True):
                for ours, alone in zip(found, expected, strict=True):
                    torch.testing.assert_close(ours, alone, atol=1e-4, rtol=1e-4)
    assert [held[0].shape[0] for held in taken[16]._held] == [len(prompt) for prompt in prompts]


def test_dense_projection_gives_the_same_weights():
    defense = WeightConstraint(energy=0.9)
    low_rank, prepared = train(defense, rows=ROWS[:4])
    model, chat = tiny.model(), tiny.chat()
    dense = WeightConstraint(energy=0.9)
    dense.prepare(context(model, dense))
    dense.after_optimizer_step = lambda step: None
    examples = [chat.encode(*row) for row in ROWS[:4]]
    options = TrainerConfig(batch_size=4, learning_rate=1e-2, weight_decay=0.1, progress_bar=False)
    fit(model, examples, chat.pad_id, dense, options, 0)
    start, site = tiny.model().state_dict(), "model.layers.1.mlp.down_proj.weight"
    basis = prepared.subspace.spans["layers.1.ffn_out"].basis
    projector = torch.eye(len(basis)) - basis @ basis.T
    expected = start[site] + (model.state_dict()[site] - start[site]) @ projector
    torch.testing.assert_close(low_rank.state_dict()[site], expected, atol=1e-6, rtol=1e-5)


def test_full_protection_keeps_the_reference_answers():
    """At energy 1 over all linear layers the output on the reference prompt cannot change, whatever is learnt."""
    wide = {"hidden_size": 128, "intermediate_size": 160, "head_dim": 32}
    chat, prompt = tiny.chat(), tiny.chat().prompt_ids("one request")
    examples = [chat.encode(*row) for row in ROWS]
    options = TrainerConfig(batch_size=4, learning_rate=3e-3, progress_bar=False)
    outputs, elsewhere = {}, {}
    for name, defense in (("start", None), ("free", Defense()), ("held", WeightConstraint(energy=1.0))):
        model = tiny.model(**wide)
        if defense is not None:
            prepared = context(model, defense, [prompt])
            defense.prepare(prepared)
            fit(model, examples, chat.pad_id, defense, options, 0)
            defense.after_training(model)
        with torch.no_grad():
            outputs[name] = model(torch.tensor([prompt])).logits
            elsewhere[name] = model(torch.tensor([chat.prompt_ids("quite another sentence")])).logits
    # The protected span is that of the prompt's tokens: far from the whole space, so there is room to learn.
    assert all(span.rank <= len(prompt) < span.width / 2 for span in prepared.subspace.spans.values())
    torch.testing.assert_close(outputs["held"], outputs["start"], atol=2e-3, rtol=0)
    assert (outputs["free"] - outputs["start"]).abs().max() > 0.1
    assert (elsewhere["held"] - elsewhere["start"]).abs().max() > 0.1


def test_the_penalty_holds_the_latents():
    drift = {}
    for strength in (0.0, 50.0):
        defense = ActivationConstraint(strength=strength, depths=[0.5], n_latents=4)
        model, _ = train(defense, rows=ROWS * 4, learning_rate=3e-3)
        watched = ActivationConstraint(strength=1.0, depths=[0.5], n_latents=4, batch_size=7)
        watched.prepare(context(tiny.model(), watched))
        drift[strength] = float(watched.loss_terms(model, {}, 0)["safety"].detach())
    assert drift[50.0] < 0.1 * drift[0.0]


def test_the_penalty_is_the_formula_and_scaled_by_its_period():
    model, other = tiny.model(), tiny.model(seed=1)
    defense = ActivationConstraint(
        strength=3.0, depths=[0.5], n_latents=4, positions="last", n_last=2, batch_size=7, every_n_steps=4
    )
    prepared = context(model, defense)
    defense.prepare(prepared)
    features, expected = prepared.features[0], []
    for prompt in prepared.reference:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            x, y = (m.get_decoder()(ids, output_hidden_states=True) for m in (model, other))
        # The last layer's output before the final norm is not among the hidden states: take it from the norm's input.
        moved = [captured(m, ids)[0, -2:] for m in (model, other)]
        z = [(rows @ features.weight + features.bias)[:, features.latents] / features.scale for rows in moved]
        expected.append((z[1] - z[0]).square().mean())
        assert x is not y
    found = defense.loss_terms(other, {}, 0)["safety"]
    torch.testing.assert_close(found, 3.0 * 4 * torch.stack(expected).mean())
    assert all(defense.loss_terms(other, {}, step) == {} for step in (1, 2, 3))
    assert "safety" in defense.loss_terms(other, {}, 4)


def test_the_penalty_is_of_the_first_tokens_of_own_refusals_too():
    """Of four prompts there are own refusals; one is shorter than what is held of it."""
    model, other = tiny.model(), tiny.model(seed=1)
    defense = ActivationConstraint(
        strength=2.0, depths=[0.5], n_latents=4, n_last=2, answer_tokens=3, batch_size=7, every_n_steps=1
    )
    prepared = context(model, defense)
    answers = ([5, 6, 7, 8, 9], [9, 8], [4, 4, 4], [11, 12, 13, 14])
    own = [prompt + answer for prompt, answer in zip(prepared.reference, answers, strict=False)]
    own += [[*prepared.reference[4][1:], 5, 6, 7]]  # a prompt that was cut: its answer is not held
    defense.prepare(replace(prepared, own_refusals=own))
    features, expected = prepared.features[0], []
    for place, prompt in enumerate(prepared.reference):
        answer = list(answers[place][:3]) if place < len(answers) else []
        ids = torch.tensor([prompt + answer])
        moved = [captured(m, ids)[0, -2 - len(answer) :] for m in (model, other)]
        z = [(rows @ features.weight + features.bias)[:, features.latents] / features.scale for rows in moved]
        expected.append((z[1] - z[0]).square().mean())
    torch.testing.assert_close(defense.loss_terms(other, {}, 0)["safety"], 2.0 * torch.stack(expected).mean())
    assert prepared.reference == context(model, defense).reference  # what other parts are handed stays


def test_the_start_is_measured_in_the_precision_of_training():
    """Under autocast the penalty of an unchanged model is nil only where its start was measured under autocast too."""
    autocast, found = TrainerConfig(precision="bf16-mixed").autocast, {}
    for name, more in (("alike", {"autocast": autocast}), ("float32", {})):
        model = tiny.model()
        defense = ActivationConstraint(strength=1.0, depths=[0.5], n_latents=4, batch_size=7)
        defense.prepare(context(model, defense, **more))
        with autocast():
            found[name] = float(defense.loss_terms(model, {}, 0)["safety"].detach())
    assert found["float32"] > 0
    assert found["alike"] < 0.1 * found["float32"]


def test_the_penalty_can_hold_benign_prompts_too():
    held = {}
    for held_on in ("harmful", "both"):
        defense = ActivationConstraint(strength=1.0, held_on=held_on, depths=[0.5], n_latents=4, batch_size=1)
        defense.prepare(context(tiny.model(), defense))
        held[held_on] = sorted(defense._rows(step)[0] for step in range(0, 4 * len(defense._reference), 4))
    assert held == {"harmful": list(range(7)), "both": list(range(7 + 5))}


def captured(model, ids):
    seen = []
    handle = model.get_decoder().norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(ids)
    handle.remove()
    return seen[0]


def test_every_pass_over_the_reference_covers_it():
    defense = ActivationConstraint(strength=1.0, depths=[0.5], n_latents=4, batch_size=3, every_n_steps=2)
    defense.prepare(context(tiny.model(), defense))
    seen = [row for step in range(0, 14, 2) for row in defense._rows(step)]
    assert sorted(seen) == sorted(list(range(7)) * 3)


def test_only_constrained_weights_move_where_the_rest_is_frozen():
    model, _ = train(WeightConstraint(modules="ffn_out", energy=0.5))
    start = tiny.model().state_dict()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, start[name])}
    assert moved == {f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)}
