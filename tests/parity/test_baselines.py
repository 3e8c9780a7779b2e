"""Every baseline against a few plain lines of its formula, over several steps of AdamW on a tiny model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy

import tiny
from cwac_lab.baselines.asft import AsFT, rotated
from cwac_lab.baselines.constrained_sft import ConstrainedSFT
from cwac_lab.baselines.kl import KL, divergence
from cwac_lab.baselines.l2 import L2
from cwac_lab.baselines.ldifs import LDIFS
from cwac_lab.baselines.lisa import Lisa
from cwac_lab.baselines.safe_instruct import SafeInstruct
from cwac_lab.baselines.safegrad import SafeGrad
from cwac_lab.baselines.safelora import SafeLoRA
from cwac_lab.baselines.sppft import SPPFT
from cwac_lab.data.batches import TrainData, collate, cyclic
from cwac_lab.data.mixing import TrainRow
from cwac_lab.defense import Context
from cwac_lab.errors import ConfigError, LabError
from cwac_lab.models.chat import IGNORED
from cwac_lab.training.loop import fit
from cwac_lab.training.module import TrainerConfig

ROWS = [(f"question {i} " + "more " * (i % 4), "an answer " + str(i)) for i in range(16)]
REFUSALS = [TrainRow(f"r{i}", f"bad request {i}" + " now" * (i % 3), "I can't help.", False) for i in range(5)]
RATE = 3e-3
SITES = [f"model.layers.{layer}.self_attn.{name}_proj.weight" for layer in range(2) for name in ("q", "k", "v", "o")]


def base_of(start):
    source = torch.Generator().manual_seed(5)
    return {name: value - 0.05 * torch.randn(value.shape, generator=source) for name, value in start.items()}


def context(model):
    start = {name: value.detach().clone() for name, value in model.state_dict().items()}
    return Context(model, 0, tiny.chat(), start.__getitem__, refusals=REFUSALS, base_weight=base_of(start).__getitem__)


def trained(defense, **changes):
    """Return the weights after the bench's own training."""
    model, chat = tiny.model(**changes), tiny.chat()
    defense.prepare(context(model))
    examples = [chat.encode(*row) for row in ROWS]
    options = TrainerConfig(
        batch_size=4, learning_rate=RATE, schedule="constant", gradient_clip=0.0, progress_bar=False
    )
    fit(model, examples, chat.pad_id, defense, options, 0)
    defense.after_training(model)
    return model.state_dict()


def batches():
    chat = tiny.chat()
    data = TrainData([chat.encode(*row) for row in ROWS], chat.pad_id, 4, 1, 0)
    return list(data.train_dataloader())


def token_losses(model, batch):
    """Return log-probabilities (N, V) at the answer tokens, and the tokens, from a full forward."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    return logits[targets != IGNORED].log_softmax(-1), targets[targets != IGNORED]


def plain(loss, *, freeze=(), after=None, batch_of=None, gradients=None, **changes):
    """Train by hand: ``loss(model, start, batch, step)``, AdamW, nothing clever."""
    model = tiny.model(**changes)
    start = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in freeze))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    for step, batch in enumerate(batches()):
        batch = batch_of(step, batch) if batch_of else batch
        optimizer.zero_grad()
        loss(model, start, batch, step).backward()
        if gradients:
            gradients(model, start, step)
        optimizer.step()
        if after:
            after(model, step)
    return model.state_dict()


def sft(model, start, batch, step):
    logits, targets = token_losses(model, batch)
    return cross_entropy(logits, targets)


def assert_equal(found, expected):
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=2e-5, rtol=1e-4, msg=lambda text, at=name: f"{at}: {text}")


def squared(model, anchor):
    return sum((p - anchor[name]).square().sum() for name, p in model.named_parameters())


def l2(model, start, batch, step):
    return sft(model, start, batch, step) + 0.7 * squared(model, dict(start.named_parameters()))


def kl(model, start, batch, step):
    now, before = token_losses(model, batch)[0], token_losses(start, batch)[0].detach()
    return sft(model, start, batch, step) + 0.7 * (before.exp() * (before - now)).sum(-1).mean()


def constrained(model, start, batch, step):
    """The gradient of the objective is cross-entropy's, weighted by 2 (1 - sigmoid(beta delta)) token by token."""
    (now, targets), (before, _) = token_losses(model, batch), token_losses(start, batch)
    now, before = (x.gather(1, targets[:, None])[:, 0] for x in (now, before))
    places = [place for row in batch["labels"].tolist() for place in range(sum(label != IGNORED for label in row))]
    beta = torch.tensor([0.5 if place == 0 else 2.0 if place < 5 else 0.1 for place in places])
    weight = 2 * (1 - torch.sigmoid(beta * (now - before.detach()))).detach()
    return -(weight * now).mean()


def ldifs(model, start, batch, step):
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    real = batch["attention_mask"].bool()
    now, before = (m(**inputs, output_hidden_states=True).hidden_states[1][real] for m in (model, start))
    now, before = (x / x.norm(dim=-1, keepdim=True) for x in (now, before.detach()))
    return sft(model, start, batch, step) + 5.0 * (now - before).square().sum(-1).mean()


def asft(model, start, batch, step):
    base = base_of(start.state_dict())
    total = sft(model, start, batch, step)
    for name, weight in model.named_parameters():
        if name in SITES:
            first = start.state_dict()[name]
            direction = first - base[name]
            matrix = direction @ direction.T / direction.square().sum().sqrt()
            total = total + 0.7 * ((torch.eye(len(matrix)) - matrix) @ (weight - first)).square().sum()
    return total


LOSSES = {
    "l2": (lambda: L2(strength=0.7), l2),
    "kl": (lambda: KL(strength=0.7), kl),
    "constrained_sft": (lambda: ConstrainedSFT(), constrained),
    "ldifs": (lambda: LDIFS(strength=5.0, depths=[0.0]), ldifs),
    "asft": (lambda: AsFT(strength=0.7), asft),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_is_the_formula(name):
    make, formula = LOSSES[name]
    assert_equal(trained(make()), plain(formula))


def test_kl_on_refusals():
    def formula(model, start, batch, step):
        asked = refusal_batch(cyclic(5, 2, step, "kl/0"))
        now, before = token_losses(model, asked)[0], token_losses(start, asked)[0].detach()
        return sft(model, start, batch, step) + 0.7 * (before.exp() * (before - now)).sum(-1).mean()

    assert_equal(trained(KL(strength=0.7, held_on="refusals", batch_size=2)), plain(formula))


def refusal_batch(rows):
    chat = tiny.chat()
    return collate([chat.encode(REFUSALS[row].prompt, REFUSALS[row].response) for row in rows], chat.pad_id)


def test_sppft_trains_all_but_the_block():
    found = trained(SPPFT(block=[0.5, 1.0]))
    assert_equal(found, plain(sft, freeze=("model.layers.1.",)))
    start = tiny.model().state_dict()
    held = {name for name in start if torch.equal(start[name], found[name])}
    assert held == {name for name in start if ".layers.1." in name}


@pytest.mark.parametrize("warmup", [0.0, 0.5])
def test_lisa_alternates_and_holds_on_to_the_other_state(warmup):
    anchors, previous = {}, []

    def batch_of(step, batch):
        return refusal_batch(cyclic(5, 4, step // 2, "lisa/0")) if step % 2 == 0 else batch

    def formula(model, start, batch, step):
        if not anchors:
            anchors.update(safe=start.state_dict(), user=start.state_dict())
        other = "user" if step % 2 == 0 else "safe"
        pull = 0.5 * 3.0 * squared(model, anchors[other]) if step >= warmup * 4 else 0.0
        return sft(model, start, batch, step) + pull

    def after(model, step):
        anchors["safe" if step % 2 == 0 else "user"] = {k: v.detach().clone() for k, v in model.state_dict().items()}
        previous.append(step)

    defense = Lisa(safety_steps=1, user_steps=1, strength=3.0, warmup_share=warmup)
    assert_equal(trained(defense), plain(formula, batch_of=batch_of, after=after))
    assert defense.summary() == {"lisa_switches": 3}


def test_lisa_draws_new_refusals_for_every_micro_batch():
    defense, seen = Lisa(safety_steps=2, user_steps=1), []
    defense.prepare(context(tiny.model()))
    user = batches()[0]
    for step in (0, 0, 1, 2, 3):
        seen.append(defense.select_batch(step, user)["input_ids"].tolist())
    drawn = [refusal_batch(cyclic(5, 4, turn, "lisa/0"))["input_ids"].tolist() for turn in range(4)]
    assert seen == [*drawn[:3], user["input_ids"].tolist(), drawn[3]]


def test_lisa_without_anchors_still_switches():
    defense = Lisa(safety_steps=2, user_steps=1, strength=0.0)
    trained(defense)
    assert [defense.state(step) for step in range(4)] == ["safe", "safe", "user", "safe"]
    assert defense.summary() == {"lisa_switches": 2}


def test_safegrad_operates_on_the_whole_gradient():
    conflicts = []

    def gradients(model, start, step):
        asked = refusal_batch(cyclic(5, 4, step, "safegrad/0"))
        user = torch.cat([p.grad.flatten() for p in model.parameters()])
        now, before = token_losses(model, asked)[0], token_losses(start, asked)[0].detach()
        divergence = (before.exp() * (before - now)).sum(-1).mean()
        safe = torch.cat([g.flatten() for g in torch.autograd.grad(divergence, list(model.parameters()))])
        inner = user @ safe
        conflicts.append(bool(inner < 0))
        if step and inner < 0:  # at the start the divergence is flat
            user = user - inner / (safe @ safe) * safe
        user = user + 0.5 * safe
        for p, part in zip(model.parameters(), user.split([p.numel() for p in model.parameters()]), strict=True):
            p.grad.copy_(part.view_as(p))

    defense = SafeGrad(strength=0.5, batch_size=4)
    found = trained(defense)
    assert_equal(found, plain(sft, gradients=gradients))
    assert any(conflicts[1:])


def test_safegrad_leaves_gradients_that_agree():
    """The divergence's gradient at a moved model, taken as the user's: nothing is in conflict, so it is only added."""
    model, defense = tiny.model(), SafeGrad(strength=0.5, batch_size=5)
    defense.prepare(context(model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.sign(parameter))
    loss = divergence(model, tiny.model(), refusal_batch(range(5)))
    user = torch.autograd.grad(loss, list(model.parameters()))
    for parameter, gradient in zip(model.parameters(), user, strict=True):
        parameter.grad = gradient.clone()
    defense.after_backward(0)
    assert defense.step_metrics(0) == {"safegrad/conflicts": 0.0}
    for parameter, gradient in zip(model.parameters(), user, strict=True):
        torch.testing.assert_close(parameter.grad, 1.5 * gradient, atol=1e-6, rtol=1e-4)


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
        assert {layer.name for layer in defense._layers} == set(SITES)
        assert all(layer.matrix.shape == (len(layer.weight),) * 2 for layer in defense._layers)


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
        torch.testing.assert_close(layer.matrix.trace(), (layer.start - base[layer.name]).norm())
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


@pytest.mark.parametrize(
    ("share", "mixing", "total", "refusals"),
    [(0.2, "add", 24, 4), (0.2, "replace", 20, 4), (None, "add", 25, 5), (0.0, "add", 20, 0)],
)
def test_safety_rows_among_the_others(share, mixing, total, refusals):
    rows = [TrainRow(f"row{i}", f"question {i}", "answer", i % 5 == 0) for i in range(20)]
    defense = SafeInstruct(share, mixing)
    defense.prepare(context(tiny.model()))
    mixed = defense.wrap_dataset(rows)
    assert len(mixed) == total
    assert sum(row in REFUSALS for row in mixed) == refusals
    assert sum(row.harmful for row in mixed) == 4
    assert mixed == defense.wrap_dataset(rows)


def test_more_safety_rows_than_the_pool_holds():
    defense = SafeInstruct(0.5)
    defense.prepare(context(tiny.model()))
    with pytest.raises(ConfigError, match=r"share=0.5: accepted: at most 0.25"):
        defense.wrap_dataset([TrainRow(str(i), str(i), "answer", False) for i in range(20)])
