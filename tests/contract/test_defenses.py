"""One table over all defences: what each must hold on a tiny model. A new defence is one row."""

from __future__ import annotations

import pytest
import torch

import tiny
from cwac_lab.baselines.asft import AsFT
from cwac_lab.baselines.constrained_sft import ConstrainedSFT
from cwac_lab.baselines.kl import KL
from cwac_lab.baselines.l2 import L2
from cwac_lab.baselines.ldifs import LDIFS
from cwac_lab.baselines.lisa import Lisa
from cwac_lab.baselines.safe_instruct import SafeInstruct
from cwac_lab.baselines.safegrad import SafeGrad
from cwac_lab.baselines.safelora import SafeLoRA
from cwac_lab.baselines.sppft import SPPFT
from cwac_lab.constraints.activation import ActivationConstraint
from cwac_lab.constraints.weight import WeightConstraint
from cwac_lab.data.mixing import TrainRow
from cwac_lab.defense import Composite, Context, Defense
from cwac_lab.linalg import leading_eigenbasis
from cwac_lab.sae.latents import LayerFeatures
from cwac_lab.subspace.basis import Subspace, second_moments
from cwac_lab.training.checkpoint import Resume
from cwac_lab.training.loop import fit
from cwac_lab.training.module import TrainerConfig

FREE = {"energy": None, "rank": 0, "trainable": "all"}


def coupled(weight, activation):
    return Composite({"weight": weight, "activation": activation})


ZERO = {
    "none": lambda: Composite(),
    "weight": lambda: WeightConstraint(**FREE),
    "weight_gradient": lambda: WeightConstraint(**FREE, projection="gradient"),
    "activation": lambda: ActivationConstraint(strength=0),
    "coupled": lambda: coupled(WeightConstraint(**FREE), ActivationConstraint(strength=0)),
    "safe_instruct": lambda: SafeInstruct(share=0.0),
    "lisa": lambda: Lisa(safety_steps=0, strength=0),
    "sppft": lambda: SPPFT(block=[0.5, 0.5]),
    "l2": lambda: L2(strength=0),
    "kl": lambda: KL(strength=0),
    "constrained_sft": lambda: ConstrainedSFT(beta=0),
    "ldifs": lambda: LDIFS(strength=0),
    "safegrad": lambda: SafeGrad(strength=0),
    "safelora": lambda: SafeLoRA(share=0.0),
    "asft": lambda: AsFT(strength=0),
}
ACTIVE = {
    "none": lambda: Composite(),
    "weight": lambda: WeightConstraint(energy=0.9, trainable="all"),
    "weight_gradient": lambda: WeightConstraint(energy=0.9, projection="gradient", trainable="all"),
    "weight_both": lambda: WeightConstraint(energy=0.9, projection="both"),
    "activation": lambda: ActivationConstraint(strength=2.0, depths=[0.5], n_latents=4, every_n_steps=2, batch_size=3),
    "activation_both": lambda: ActivationConstraint(strength=2.0, held_on="both", depths=[0.5], n_latents=4),
    "coupled": lambda: coupled(
        WeightConstraint(energy=0.9), ActivationConstraint(strength=2.0, depths=[0.5], n_latents=4, batch_size=3)
    ),
    "safe_instruct": lambda: SafeInstruct(share=0.2),
    "safe_instruct_replace": lambda: SafeInstruct(share=0.2, mixing="replace"),
    "lisa": lambda: Lisa(safety_steps=1, user_steps=2, strength=3.0, warmup_share=0.3),
    "sppft": lambda: SPPFT(block=[0.0, 0.5]),
    "l2": lambda: L2(strength=2.0),
    "kl": lambda: KL(strength=2.0),
    "kl_refusals": lambda: KL(strength=2.0, held_on="refusals", batch_size=3),
    "constrained_sft": lambda: ConstrainedSFT(beta=1.0),
    "ldifs": lambda: LDIFS(strength=2.0, depths=[0.0, 0.5]),
    "safegrad": lambda: SafeGrad(strength=1.0, batch_size=3),
    "safelora": lambda: SafeLoRA(share=0.5),
    "asft": lambda: AsFT(strength=2.0),
    "lisa+weight": lambda: Composite({"lisa": Lisa(1, 2, warmup_share=0.0), "weight": WeightConstraint(energy=0.9)}),
    "lisa+sppft": lambda: Composite({"lisa": Lisa(1, 2, warmup_share=0.0), "sppft": SPPFT(block=[0.5, 1.0])}),
}
ROWS = [(f"question {i} " + "more " * (i % 5), "an answer " + str(i)) for i in range(24)]
PROMPTS = [f"request number {i}, how do I" + " really" * (i % 3) for i in range(7)]


def context(model, defense, reference=None, **more):
    chat, needs = tiny.chat(), defense.requirements
    reference = reference or [chat.prompt_ids(prompt) for prompt in PROMPTS]
    subspace = None
    if needs.subspace is not None:
        bases, kept = {}, {}
        for name, moment in second_moments(model, reference, needs.subspace, chat.pad_id).items():
            basis, kept[name] = leading_eigenbasis(moment, energy=needs.subspace.energy, rank=needs.subspace.rank)
            bases[name] = basis.float()
        subspace = Subspace(bases, kept)
    features = ()
    if needs.features is not None:
        source = torch.Generator().manual_seed(1)
        weight = torch.randn(32, 12, generator=source)
        latents = torch.arange(needs.features.n_latents)
        features = (LayerFeatures(1, weight, torch.zeros(12), 6, latents, torch.ones(len(latents))),)
    start = {name: value.detach().clone() for name, value in model.state_dict().items()}
    benign = [chat.prompt_ids(prompt) for prompt, _ in ROWS[:5]]
    refusals = [TrainRow(prompt, prompt, "I can't help with that.", False) for prompt in PROMPTS]
    noise = torch.Generator().manual_seed(2)
    base = {name: value + 0.02 * torch.randn(value.shape, generator=noise) for name, value in start.items()}
    return Context(
        model, 0, chat, start.__getitem__, reference, benign, refusals, base.__getitem__, subspace, features, **more
    )


def train(defense, *, architecture="llama", rows=ROWS, **settings):
    model, chat = tiny.model(architecture), tiny.chat()
    prepared = context(model, defense)
    defense.prepare(prepared)
    rows = [
        (row.prompt, row.response)
        for row in defense.wrap_dataset([TrainRow(prompt, prompt, answer, False) for prompt, answer in rows])
    ]
    options = {"batch_size": 4, "learning_rate": 1e-2, "weight_decay": 0.1, "progress_bar": False} | settings
    checkpoint = options.pop("checkpoint", None)
    callbacks = options.pop("callbacks", ())
    examples = [chat.encode(*row) for row in rows]
    fit(model, examples, chat.pad_id, defense, TrainerConfig(**options), 0, checkpoint=checkpoint, callbacks=callbacks)
    defense.after_training(model)
    return model, prepared


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def plain():
    return weights(train(Defense())[0])


@pytest.mark.parametrize("name", ZERO)
def test_zero_strength_is_plain_fine_tuning_bit_for_bit(name, plain):
    trained = weights(train(ZERO[name]())[0])
    assert same(trained, plain)
    assert not same(trained, weights(tiny.model()))


@pytest.mark.parametrize("name", [name for name in ACTIVE if name != "none"])
def test_an_active_constraint_changes_the_outcome(name, plain):
    assert not same(weights(train(ACTIVE[name]())[0]), plain)


@pytest.mark.parametrize(("accumulate", "saved"), [(1, 6), (2, 3)])
@pytest.mark.parametrize("name", ACTIVE)
def test_a_resumed_run_continues_exactly(name, accumulate, saved, tmp_path):
    import lightning as L

    class Killed(Exception):
        pass

    class Kill(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 8:
                raise Killed

    settings = {"epochs": 2, "schedule": "cosine", "checkpoint_every_n_steps": 3, "accumulate": accumulate}
    whole = weights(train(ACTIVE[name](), **settings)[0])
    folder = tmp_path / "checkpoint"
    with pytest.raises(Killed):
        train(ACTIVE[name](), **settings, checkpoint=folder, callbacks=[Kill()])
    assert Resume(folder).step == saved
    assert same(weights(train(ACTIVE[name](), **settings, checkpoint=folder)[0]), whole)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_update_projection_leaks_nothing_under_adamw_with_weight_decay(architecture):
    leaks = {}
    for projection in ("update", "both", "gradient"):
        defense = WeightConstraint(energy=0.9, projection=projection)
        train(defense, architecture=architecture, rows=ROWS * 9, learning_rate=1e-3)  # 54 steps
        leaks[projection] = defense.summary()["leak"]
    assert max(leaks["update"], leaks["both"]) < 1e-5
    assert leaks["gradient"] > 1000 * leaks["update"]


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


def test_hooks_are_called_once_an_optimizer_step():
    from dataclasses import dataclass

    @dataclass
    class Counted(Defense):
        def __post_init__(self):
            self.calls = []

        def loss_terms(self, model, batch, step):
            self.calls.append(("loss", step))
            return {}

        def after_backward(self, step):
            self.calls.append(("backward", step))

        def after_optimizer_step(self, step):
            self.calls.append(("step", step))

    defense = Counted()
    train(defense, rows=ROWS[:16], accumulate=2)
    assert defense.calls == [
        (hook, step) for step in range(2) for hook in ("loss", "loss", "backward", "step")
    ]  # fmt: skip


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


@pytest.mark.parametrize("names", [("sppft", "weight"), ("weight", "sppft")])
def test_a_frozen_block_stays_frozen_whatever_the_order(names):
    parts = {"sppft": SPPFT(block=[0.5, 1.0]), "weight": WeightConstraint(energy=0.5)}
    model, _ = train(Composite({name: parts[name] for name in names}))
    start = tiny.model().state_dict()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, start[name])}
    assert moved
    assert all(name.startswith("model.layers.0.") for name in moved)
