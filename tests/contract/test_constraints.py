"""The two constraints of CWAC on tiny models: what they hold exactly, and what their terms are."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cwac_lab.core import linalg
from cwac_lab.core.errors import ConfigError
from cwac_lab.defenses.cwac import activation, projected
from cwac_lab.defenses.cwac.activation import ActivationConstraint
from cwac_lab.defenses.cwac.projected import Projection, WithoutSpan, cheapest_order, project_gradients, release
from cwac_lab.defenses.cwac.weight import WeightConstraint
from cwac_lab.defenses.interface import Defense
from cwac_lab.training.loop import fit
from cwac_lab.training.settings import TrainerConfig
from support import tiny
from support.cover import some
from support.held import ROWS, context, train


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


@pytest.mark.parametrize("n_tokens", [16, 128])
@pytest.mark.parametrize("directions", [8, 80])
def test_gradients_are_projected_in_float32_under_autocast(directions, n_tokens):
    """Most of a token lies along V; what is left of it after rounding to bfloat16 must be small beside the rest."""
    source = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(96, directions, generator=source)).Q
    tokens = torch.randn(n_tokens, directions, generator=source) @ basis.T
    tokens = 10 * tokens + torch.randn(n_tokens, 96, generator=source)
    layer = torch.nn.Linear(96, 64)
    project_gradients([layer], WithoutSpan(basis))
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(tokens)
    gradient = torch.randn(out.shape, generator=source)
    (out.float() * gradient).sum().backward()
    assert (layer.weight.grad @ basis).norm() < 0.004 * layer.weight.grad.norm()
    exact = gradient.T.double() @ (tokens.double() @ (torch.eye(96).double() - (basis @ basis.T).double()))
    assert (layer.weight.grad - exact).norm() < 0.012 * exact.norm()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [4, 40])  # fewer and more than the layer has outputs
@pytest.mark.parametrize("directions", [3, 9, 12])  # the others are as many, or none
def test_a_projected_layer_has_projected_gradients(directions, tokens, bias):
    source = torch.Generator().manual_seed(0)
    plain, basis = torch.nn.Linear(12, 10, bias=bias), torch.linalg.qr(torch.randn(12, directions, generator=source)).Q
    held = copy.deepcopy(plain)
    project_gradients([held], WithoutSpan(basis))
    held = copy.deepcopy(held)
    x = torch.randn(2, tokens // 2, 12, generator=source)
    grads = {}
    for name, layer in (("plain", plain), ("held", held)):
        inputs = x.clone().requires_grad_()
        layer(inputs).pow(3).sum().backward()
        grads[name] = [inputs.grad, *(parameter.grad for parameter in layer.parameters())]
    grads["plain"][1] = grads["plain"][1] - grads["plain"][1] @ basis @ basis.T
    for ours, expected in zip(grads["held"], grads["plain"], strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-5)
    assert held.state_dict().keys() == plain.state_dict().keys()
    with torch.autocast("cpu", torch.bfloat16):
        held.zero_grad()
        held(x).float().pow(3).sum().backward()
    assert (held.weight.grad - grads["plain"][1]).norm() <= 0.02 * grads["plain"][1].norm() + 1e-3
    release(held)
    assert type(held) is torch.nn.Linear
    torch.testing.assert_close(held(x), plain(x))


def site(rows, source, directions=3):
    """Return layers that read one input of width 12, projected off some directions, and the dense projector."""
    basis = torch.linalg.qr(torch.randn(12, directions, generator=source)).Q
    layers = [torch.nn.Linear(12, each, bias=False) for each in rows]
    project_gradients(layers, WithoutSpan(basis))
    return layers, torch.eye(12) - basis @ basis.T


# Few and many tokens beside the layers' 24 outputs; then the directions that are protected, of 12.
@pytest.mark.parametrize(
    ("tokens", "directions", "order"),
    [(4, 3, "tokens"), (40, 3, "gradients"), (4, 9, "coordinates"), (4, 7, "tokens"), (400, 7, "coordinates")],
)
def test_layers_of_one_input_share_its_projection(tokens, directions, order, monkeypatch):
    """Every input is projected once, another one of the same site or of another anew, and so is memory written anew."""
    source = torch.Generator().manual_seed(0)
    sites = [site((12, 6, 6), source, directions) for _ in range(2)]
    calls, remove, product = [], linalg.remove_span, linalg.product
    monkeypatch.setattr(linalg, "remove_span", lambda *given: (calls.append(given[0].shape), remove(*given))[1])
    # Of the complement: what is multiplied by U.
    by = (12, 12 - directions)
    seen = lambda *given: (given[1].shape == by and calls.append(given[0].shape), product(*given))[1]  # noqa: E731
    monkeypatch.setattr(linalg, "product", seen)
    assert cheapest_order(tokens, 12, 24, directions) == order
    shared = order != "gradients"

    def check(read, inputs, expected):
        """``read`` names the sites that read the inputs one after the other, each what the one before returned."""
        parts = []
        for x in inputs:
            for layers, projector in read:
                out = [layer(x) for layer in layers]
                for part in out:
                    part.retain_grad()
                parts += [(layer, part, x.detach().clone(), projector) for layer, part in zip(layers, out, strict=True)]
                x = out[0] * torch.cat(out[1:], -1)
            x.pow(2).sum().backward()
        for layer in {id(layer): layer for layer, *_ in parts}.values():
            sums = [part.grad.T @ before @ projector for each, part, before, projector in parts if each is layer]
            expected_gradient = sum(sums)
            assert (layer.weight.grad - expected_gradient).norm() < 1e-5 * expected_gradient.norm()
            layer.weight.grad = None
        assert len(calls) == (expected if shared else 3 * len(read) * len(inputs))
        calls.clear()

    x, other = torch.randn(tokens, 12, generator=source), torch.randn(tokens, 12, generator=source)
    check(sites, [x], 2)
    check(sites[:1], [x, other], 1)  # x is what was projected last
    check(sites[:1], [other], 0)
    other.copy_(x + 1)
    check(sites[:1], [other], 1)
    release(sites[0][0][0])
    assert Projection._last is None


@pytest.mark.parametrize(
    ("n", "width", "rows", "k", "order"),
    [
        # a sixth of SmolLM2's widths
        (50, 96, 160, 27, "tokens"),
        (680, 96, 160, 27, "gradients"),
        (50, 96, 512, 78, "coordinates"),
        (680, 96, 512, 78, "coordinates"),
        (50, 256, 96, 173, "tokens"),
        (680, 256, 96, 173, "gradients"),
        (16, 64, 64, 64, "coordinates"),
    ],
)
def test_the_order_of_products_is_the_one_with_fewest_multiplications(n, width, rows, k, order):
    """Counted by torch on the very products, in every order."""
    assert cheapest_order(n, width, rows, k) == order
    counted = {}
    x, g = torch.randn(n, width), torch.randn(n, rows)
    basis = torch.linalg.qr(torch.randn(width, k)).Q
    for each in ("tokens", "gradients", "coordinates") if 2 * k > width else ("tokens", "gradients"):
        projection = Projection(WithoutSpan(basis), 1, rows)
        with pytest.MonkeyPatch.context() as patch, FlopCounterMode(display=False) as counter:
            patch.setattr(projected, "cheapest_order", lambda *_, each=each: each)
            found = projection.gradient(g, x)
        counted[each] = counter.get_total_flops()
        expected = g.T @ (x - x @ basis @ basis.T)
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    assert counted[order] == min(counted.values())
    # With few free directions the projected gradient takes fewer multiplications than the plain one.
    assert (counted[order] < 2 * n * width * rows) == (order == "coordinates")


def test_gradients_projected_off_some_directions_leave_no_update_along_any():
    removed = {}
    for share in (1.0, 0.5):
        defense = WeightConstraint(energy=0.9, gradient_share=share, restore_every_n_steps=2)
        taken = removed.setdefault(share, [])
        defense._restore = lambda of=defense, taken=taken: (WeightConstraint._restore(of), taken.append(of._removed))
        _, prepared = train(defense, rows=ROWS * 3, learning_rate=1e-3)
        for held in defense._held:
            basis = prepared.subspace.bases[held.linear.site.name]
            assert held.basis.shape == basis.shape
        assert defense.summary()["leak"] < 1e-5
    assert all(half > whole for half, whole in zip(removed[0.5][:-1], removed[1.0][:-1], strict=True))


def test_the_leading_directions_are_those_that_gradients_are_projected_off():
    model, defense = tiny.model(), WeightConstraint(energy=0.9, gradient_share=0.5)
    prepared = context(model, defense)
    defense.prepare(prepared)
    for held in defense._held:
        basis = prepared.subspace.bases[held.linear.site.name]
        leading = held.linear.module.projection.without.basis
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
    basis = prepared.subspace.bases["layers.1.ffn_out"]
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
    assert all(basis.shape[1] <= len(prompt) < basis.shape[0] / 2 for basis in prepared.subspace.bases.values())
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
