"""Every baseline against a few plain lines of its formula, over several steps of AdamW on a tiny model."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from cwac_lab.core.errors import ConfigError
from cwac_lab.data.batches import cyclic
from cwac_lab.data.mixing import TrainRow
from cwac_lab.defenses.literature.asft import AsFT
from cwac_lab.defenses.literature.constrained_sft import ConstrainedSFT, answer_positions
from cwac_lab.defenses.literature.kl import KL, divergence
from cwac_lab.defenses.literature.l2 import L2
from cwac_lab.defenses.literature.ldifs import LDIFS
from cwac_lab.defenses.literature.lisa import Lisa
from cwac_lab.defenses.literature.safe_instruct import SafeInstruct
from cwac_lab.defenses.literature.safegrad import SafeGrad
from cwac_lab.defenses.literature.sppft import SPPFT
from cwac_lab.defenses.literature.start import StartLogits
from cwac_lab.models.chat import IGNORED
from support import tiny
from support.by_hand import (
    REFUSALS,
    SITES,
    assert_equal,
    base_of,
    batches,
    context,
    plain,
    refusal_batch,
    sft,
    squared,
    token_losses,
    trained,
)


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
    real, moved = batch["attention_mask"].bool(), []
    for layer in range(2):
        features = []
        for each in (model, start):
            hook = each.model.layers[layer].register_forward_hook(lambda _, __, out, seen=features: seen.append(out))
            each(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            hook.remove()
        now, before = (x[real] / x[real].norm(dim=-1, keepdim=True) for x in features)
        moved.append((now - before.detach()).square().sum(-1).mean())
    return sft(model, start, batch, step) + 5.0 * (moved[0] + moved[1]) / 2


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
    "ldifs": (lambda: LDIFS(strength=5.0, depths=[0.0, 0.5]), ldifs),
    "asft": (lambda: AsFT(strength=0.7), asft),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_is_the_formula(name):
    make, formula = LOSSES[name]
    assert_equal(trained(make()), plain(formula))


@pytest.mark.parametrize("every", [1, 2])
def test_kl_on_refusals(every):
    """At every second step it counts twice, and no refusal is passed over."""

    def formula(model, start, batch, step):
        if step % every:
            return sft(model, start, batch, step)
        asked = refusal_batch(cyclic(5, 2, step // every, "kl/0"))
        now, before = token_losses(model, asked)[0], token_losses(start, asked)[0].detach()
        return sft(model, start, batch, step) + 0.7 * every * (before.exp() * (before - now)).sum(-1).mean()

    made = KL(strength=0.7, held_on="refusals", batch_size=2, every_n_steps=every)
    assert_equal(trained(made), plain(formula))


def test_ldifs_on_refusals():
    """The formula's distance is that of the asked rows, its cross-entropy that of the task's."""

    def formula(model, start, batch, step):
        asked = refusal_batch(cyclic(5, 2, step, "ldifs/0"))
        distance = ldifs(model, start, asked, step) - sft(model, start, asked, step)
        return sft(model, start, batch, step) + distance

    made = LDIFS(strength=5.0, depths=[0.0, 0.5], held_on="refusals", batch_size=2)
    assert_equal(trained(made), plain(formula))


def test_sppft_trains_all_but_the_block():
    found = trained(SPPFT(block=[0.5, 1.0]))
    assert_equal(found, plain(sft, freeze=("model.layers.1.",)))
    start = tiny.model().state_dict()
    held = {name for name in start if torch.equal(start[name], found[name])}
    assert held == {name for name in start if ".layers.1." in name}


@pytest.mark.parametrize(("warmup", "states"), [(0.0, "susu"), (0.5, "susu"), (0.0, "ssus"), (0.0, "suus")])
def test_lisa_alternates_and_holds_on_to_the_other_state(warmup, states):
    """``states`` says what each of the four steps trains on: safety or user data."""
    anchors = {}

    def batch_of(step, batch):
        if states[step] == "u":
            return batch
        return refusal_batch(cyclic(5, 4, states[:step].count("s"), "lisa/0"))

    def formula(model, start, batch, step):
        if not anchors:
            anchors.update(safe=start.state_dict(), user=start.state_dict())
        other = "user" if states[step] == "s" else "safe"
        pull = 0.5 * 3.0 * squared(model, anchors[other]) if step >= warmup * 4 else 0.0
        return sft(model, start, batch, step) + pull

    def after(model, step):
        state = "safe" if states[step] == "s" else "user"
        anchors[state] = {k: v.detach().clone() for k, v in model.state_dict().items()}

    defense = Lisa(states.count("ss") + 1, states.count("uu") + 1, strength=3.0, warmup_share=warmup)
    assert_equal(trained(defense), plain(formula, batch_of=batch_of, after=after))
    assert defense.summary() == {"lisa_switches": sum(a != b for a, b in pairwise(states))}


def test_lisa_draws_new_refusals_for_every_step_in_the_safety_state():
    defense, seen = Lisa(safety_steps=2, user_steps=1), []
    defense.prepare(context(tiny.model()))
    user = batches()[0]
    for step in (0, 1, 2, 3, 1):
        seen.append(defense.select_batch(step, user)["input_ids"].tolist())
    drawn = [refusal_batch(cyclic(5, 4, turn, "lisa/0"))["input_ids"].tolist() for turn in range(3)]
    assert seen == [drawn[0], drawn[1], user["input_ids"].tolist(), drawn[2], drawn[1]]


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
    asked = [tiny.chat().encode(row.prompt, row.response) for row in REFUSALS]
    loss = divergence(model, StartLogits(tiny.model(), asked, tiny.chat().pad_id), refusal_batch(range(5)))
    user = torch.autograd.grad(loss, list(model.parameters()))
    for parameter, gradient in zip(model.parameters(), user, strict=True):
        parameter.grad = gradient.clone()
    defense.after_backward(0)
    assert defense.step_metrics(0) == {"safegrad/conflicts": 0.0}
    for parameter, gradient in zip(model.parameters(), user, strict=True):
        torch.testing.assert_close(parameter.grad, 1.5 * gradient, atol=1e-6, rtol=1e-4)


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


def test_each_answer_of_a_conversation_begins_at_its_first_token():
    answer, asked = 5, IGNORED
    labels = torch.tensor([[asked, asked, answer, answer, asked, asked, answer, answer, answer],
                           [asked, answer, answer, answer, answer, asked, asked, asked, asked]])  # fmt: skip
    assert answer_positions(labels).tolist() == [0, 1, 0, 1, 2, 0, 1, 2, 3]
