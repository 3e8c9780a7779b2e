"""The two constraints of CWAC on tiny models: what they hold exactly, and what their terms are."""

from __future__ import annotations

import copy

import pytest
import torch

import tiny
from cwac_lab import linalg
from cwac_lab.constraints.activation import ActivationConstraint
from cwac_lab.constraints.projected import project_gradients, release
from cwac_lab.constraints.weight import WeightConstraint
from cwac_lab.defense import Defense
from cwac_lab.training.loop import fit
from cwac_lab.training.module import TrainerConfig
from held import ROWS, context, train


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_update_projection_leaks_nothing_under_adamw_with_weight_decay(architecture):
    leaks = {}
    for projection in ("update", "both", "gradient"):
        defense = WeightConstraint(energy=0.9, projection=projection)
        train(defense, architecture=architecture, rows=ROWS * 9, learning_rate=1e-3)  # 54 steps
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
def test_gradients_are_projected_in_float32_under_autocast(n_tokens):
    """Most of a token lies along V; what is left of it after rounding to bfloat16 must be small beside the rest."""
    source = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(96, 8, generator=source)).Q
    tokens = 10 * torch.randn(n_tokens, 8, generator=source) @ basis.T + torch.randn(n_tokens, 96, generator=source)
    layer = torch.nn.Linear(96, 64)
    project_gradients([layer], basis)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(tokens)
    (out.float() * torch.randn(out.shape, generator=source)).sum().backward()
    assert (layer.weight.grad @ basis).norm() < 0.004 * layer.weight.grad.norm()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [4, 40])  # fewer and more than the layer has outputs
def test_a_projected_layer_has_projected_gradients(tokens, bias):
    source = torch.Generator().manual_seed(0)
    plain, basis = torch.nn.Linear(12, 10, bias=bias), torch.linalg.qr(torch.randn(12, 3, generator=source)).Q
    held = copy.deepcopy(plain)
    project_gradients([held], basis)
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
    assert (held.weight.grad - grads["plain"][1]).norm() < 0.02 * grads["plain"][1].norm()
    release(held)
    assert type(held) is torch.nn.Linear
    torch.testing.assert_close(held(x), plain(x))


@pytest.mark.parametrize("tokens", [4, 40])  # fewer and more than the layers have outputs together
def test_layers_of_one_input_share_its_projection(tokens, monkeypatch):
    """An input is projected once, also where its memory is written anew; gradients are a dense projector's."""
    source = torch.Generator().manual_seed(0)
    bases = [torch.linalg.qr(torch.randn(12, 3, generator=source)).Q for _ in range(2)]
    sites = [[torch.nn.Linear(12, rows, bias=False) for rows in (12, 6, 6)] for _ in bases]
    for layers, basis in zip(sites, bases, strict=True):
        project_gradients(layers, basis)
    calls, remove = [], linalg.remove_span
    monkeypatch.setattr(linalg, "remove_span", lambda *given: (calls.append(given[0].shape), remove(*given))[1])
    x = torch.randn(tokens, 12, generator=source)
    for turn in range(2):
        inputs, received = x, {}
        for layers, basis in zip(sites, bases, strict=True):
            parts = [layer(inputs) for layer in layers]
            for layer, part in zip(layers, parts, strict=True):
                part.retain_grad()
                received[layer] = (part, inputs.detach().clone(), torch.eye(12) - basis @ basis.T)
            inputs = parts[0] * torch.cat(parts[1:], -1)
        inputs.pow(2).sum().backward()
        for layer, (part, read, projector) in received.items():
            torch.testing.assert_close(layer.weight.grad, part.grad.T @ read @ projector, atol=1e-4, rtol=1e-4)
            layer.weight.grad = None
        assert len(calls) == (turn + 1) * (2 if tokens < 24 else 6)
        x.copy_(torch.randn(tokens, 12, generator=source))


def test_gradients_projected_off_some_directions_leave_no_update_along_any():
    removed = {}
    for share in (1.0, 0.5):
        defense = WeightConstraint(energy=0.9, gradient_share=share, restore_every_n_steps=2)
        taken = removed.setdefault(share, [])
        defense._restore = lambda of=defense, taken=taken: (WeightConstraint._restore(of), taken.append(of._removed))
        _, prepared = train(defense, rows=ROWS * 3, learning_rate=1e-3)
        for held in defense._held:
            assert held.basis.shape[1] == prepared.subspace.bases[held.linear.site.name].shape[1]
        assert defense.summary()["leak"] < 1e-5
    assert all(half > whole for half, whole in zip(removed[0.5][:-1], removed[1.0][:-1], strict=True))
    basis = torch.linalg.qr(torch.randn(12, 4, generator=torch.Generator().manual_seed(0))).Q
    layer = torch.nn.Linear(12, 6, bias=False)
    project_gradients([layer], basis[:, :2])
    layer(torch.randn(5, 12)).sum().backward()
    assert (layer.weight.grad @ basis[:, :2]).norm() < 1e-5 < (layer.weight.grad @ basis[:, 2:]).norm()


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
