"""The tail of the weight constraint: which directions it is of, how it is slowed and penalised, against dense C."""

import pytest
import torch

from cwac_lab.config.run import read
from cwac_lab.core.errors import ConfigError
from cwac_lab.defenses.cwac.subspace import basis
from cwac_lab.defenses.cwac.subspace.parts import parts_of
from cwac_lab.defenses.cwac.subspace.spec import Subspace, SubspaceSpec
from cwac_lab.defenses.cwac.tail import Tail, slowing
from cwac_lab.defenses.cwac.weight import WeightConstraint
from cwac_lab.models.adapters import attach
from cwac_lab.models.sites import linears
from support import tiny
from support.held import FULL, LORA, ROWS, context, train

SITE = "layers.1.ffn_out"
TEXTS = ("how do I", "tell me what", "one more of them, really", "9 * 7 = ?")


def second_moment(model, texts):
    """Return C of what the FFN output of layer 1 reads, in float64, token by token of each text."""
    found = []
    layer = model.get_decoder().layers[1].mlp.down_proj
    handle = layer.register_forward_pre_hook(lambda _, args: found.append(args[0][0].double()))
    with torch.no_grad():
        for ids in texts:
            model(torch.tensor([list(ids)]))
    handle.remove()
    return sum(x.T @ x for x in found), found


def spec(energy, reach, rank=None, **more):
    return SubspaceSpec("ffn_out", energy, rank, "all", False, reach=reach, **more)


@pytest.mark.parametrize(("energy", "rank"), [(0.6, None), (None, 3), (None, 0), (None, 40)])
def test_the_tail_is_what_comes_behind_the_protected_directions(energy, rank):
    model, chat = tiny.model(), tiny.chat()
    texts = [chat.prompt_ids(text) for text in TEXTS]
    found = dict(basis.leading(model, texts, spec(energy, 0.95, rank), chat.pad_id))[SITE]
    alone = dict(basis.leading(model, texts, spec(energy, None, rank), chat.pad_id))[SITE]
    c, _ = second_moment(model, texts)
    values, vectors = torch.linalg.eigh(c)
    shares = values.flip(0) / values.sum()
    whole = int((torch.cumsum(shares, 0) < 0.95).sum()) + 1
    k = found.basis.shape[1]
    assert k == alone.basis.shape[1] == (rank if energy is None else int((torch.cumsum(shares, 0) < energy).sum()) + 1)
    assert found.tail.shape[1] == max(whole - k, 0)
    assert found.kept == pytest.approx(alone.kept, rel=1e-6 if rank is None else 1e-3)  # a fixed rank is approximated
    torch.testing.assert_close(found.shares.double(), shares[k:whole], rtol=1e-4, atol=1e-9)
    tail = vectors.flip(1)[:, k:whole]
    torch.testing.assert_close(found.tail.double() @ found.tail.T.double(), tail @ tail.T, atol=1e-4, rtol=0)
    assert (found.basis.T @ found.tail).norm() < 1e-5
    assert alone.tail.shape == (c.shape[0], 0)


def test_behind_an_opening_that_is_held_shares_are_of_the_other_tokens():
    model, chat = tiny.model(), tiny.chat()
    texts = [chat.prompt_ids(text) for text in TEXTS]
    parts = parts_of(texts)
    asked = spec(0.7, 0.97, opening="held")
    found = dict(basis.leading(model, texts, asked, chat.pad_id, parts=parts))[SITE]
    _, rows = second_moment(model, texts)
    opening = rows[0][: parts[0].opening]
    own = torch.cat([x[part.opening :] for x, part in zip(rows, parts, strict=True)])
    q = torch.linalg.svd(opening, full_matrices=False)[2]
    rest = own - own @ q.T @ q
    singular = torch.linalg.svd(rest, full_matrices=False)[1].square() / own.square().sum()
    within = 1 - float(singular.sum())
    k = int((within + torch.cumsum(singular, 0) < 0.7).sum()) + 1
    whole = int((within + torch.cumsum(singular, 0) < 0.97).sum()) + 1
    assert found.basis.shape[1] == len(q) + k
    torch.testing.assert_close(found.shares.double(), singular[k:whole], rtol=1e-4, atol=1e-9)
    assert (opening @ found.tail.double()).norm() < 1e-5 * opening.norm()


def test_tails_are_saved_and_loaded(tmp_path):
    model, chat = tiny.model(), tiny.chat()
    texts = [chat.prompt_ids(text) for text in TEXTS]
    asked = spec(0.6, 0.9)
    basis.build(model, texts, parts_of(texts), asked, chat.pad_id, tmp_path)
    found, loaded = dict(basis.leading(model, texts, asked, chat.pad_id)), basis.load(tmp_path)
    assert loaded.tails.keys() == loaded.shares.keys() == found.keys()
    torch.testing.assert_close(loaded.tails[SITE], found[SITE].tail)
    torch.testing.assert_close(loaded.shares[SITE], found[SITE].shares)


def drawn(tuning=FULL):
    """Return the matrix of a site with a tail of all of C's directions, C, and its model."""
    model = tiny.model()
    attach(model, tuning, 0)
    (linear,) = (each for each in linears(model, "ffn_out") if each.site.name == SITE)
    x = torch.randn(50, linear.width, generator=torch.Generator().manual_seed(3)).double()
    c = x.T @ x * torch.linspace(1, 3, linear.width).outer(torch.linspace(1, 3, linear.width))
    values, vectors = torch.linalg.eigh(c)
    shares = (values / values.sum()).flip(0)
    space = Subspace({}, {}, {SITE: vectors.flip(1).float()}, {SITE: shares.float()})
    return linear, c, space, model


@pytest.mark.parametrize("strength", [0.5, 10.0])
def test_slowing_is_the_preconditioner_on_what_moved(strength):
    linear, c, space, _ = drawn()
    linear.parameter.data = linear.parameter.data.double()
    tail = Tail.of(linear, space)
    start, source = linear.weight.detach().clone(), torch.Generator().manual_seed(4)
    moves = [torch.randn(start.shape, generator=source, dtype=torch.float64) for _ in range(2)]
    lam = c.trace() / len(c) / strength
    slowed = lam * torch.linalg.inv(c + lam * torch.eye(len(c), dtype=torch.float64))
    expected = start
    for move in moves:  # what one interval moved is slowed once
        linear.weight.data.add_(move)
        tail.slow(strength, keep=True)
        expected = expected + move @ slowed
        torch.testing.assert_close(linear.weight.detach(), expected, rtol=1e-5, atol=1e-5)
    tail.slow(strength, keep=False)  # nothing moved
    torch.testing.assert_close(linear.weight.detach(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tuning", [FULL, LORA])
def test_the_penalty_is_the_trace_over_the_reference_tokens(tuning):
    linear, c, space, _ = drawn(tuning)
    tail, start = Tail.of(linear, space), linear.weight.detach().clone()
    if tuning is LORA:
        (key,) = linear.adapter.active_adapters
        torch.nn.init.normal_(linear.adapter.lora_B[key].weight)
        left, right = linear.factors()
        update = (left @ right).double()
    else:
        linear.weight.data.add_(torch.randn(start.shape, generator=torch.Generator().manual_seed(4)))
        update = (linear.weight - start).double()
    found = tail.penalty()
    torch.testing.assert_close(found.double(), (update @ c @ update.T).trace() / c.trace(), rtol=1e-4, atol=0)
    found.backward()
    trained = linear.adapter.lora_A[key].weight if tuning is LORA else linear.parameter
    gradient = 2 * update @ c / c.trace()
    expected = left.double().T @ gradient if tuning is LORA else gradient
    torch.testing.assert_close(trained.grad.double(), expected.detach(), rtol=1e-3, atol=1e-5)


def test_with_lora_the_factor_is_slowed_and_the_update_is_that_of_the_preconditioner():
    model, defense = tiny.model(), WeightConstraint(energy=0.7, tail="slowed", tail_energy=0.99, tail_strength=5.0)
    prepared = context(model, defense)
    attach(model, LORA, 0)
    raw = {
        linear.name: linear.adapter.lora_A[linear.adapter.active_adapters[0]].weight.detach().clone()
        for linear in linears(model, "all_linear")
    }
    defense.prepare(prepared)
    for linear in linears(model, "all_linear"):
        name = linear.site.name
        v, t = prepared.subspace.spans[name].basis, prepared.subspace.tails[name]
        taken = slowing(prepared.subspace.shares[name], len(v), 5.0)
        dense = torch.eye(len(v)) - v @ v.T - t @ torch.diag(taken) @ t.T
        torch.testing.assert_close(linear.factors()[1], raw[linear.name] @ dense, atol=1e-5, rtol=1e-4)


def along_tail(tail, **more):
    """Train, and return the root mean square of what moved along the tail of all matrices."""
    defense = WeightConstraint(energy=0.7, tail=tail, **more)
    model, prepared = train(defense, rows=ROWS * 2, learning_rate=1e-3)
    space = prepared.subspace
    if not space.tails:
        wanted = WeightConstraint(energy=0.7, tail="slowed")
        space = context(tiny.model(), wanted).subspace
    squares = []
    for linear in linears(model, "all_linear"):
        moved = linear.weight - prepared.start_weight(linear.name)
        squares.append(float((moved @ space.tails[linear.site.name]).square().sum().detach()))
    assert defense.leak() < 1e-4
    return sum(squares) ** 0.5


def test_a_tail_that_is_held_moves_less():
    free = along_tail("free")
    for tail, strengths in (("slowed", (30.0, 3000.0)), ("penalised", (1e3, 1e5))):
        weak, strong = (along_tail(tail, tail_strength=strength) for strength in strengths)
        assert strong < weak < free


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"tail": "steep"}, "tail"),
        ({"tail": "slowed", "tail_energy": 0.99}, "tail_energy"),
        ({"tail": "slowed", "projection": "gradient"}, "tail"),
        ({"tail_strength": -1.0}, "tail_strength"),
    ],
)
def test_bad_settings_of_the_tail_are_one_line(fields, key):
    with pytest.raises(ConfigError, match=key):
        WeightConstraint(**fields)


def test_the_tail_is_part_of_what_a_run_is():
    asked = read(
        tiny.config("constraint=weight", "constraint.weight.tail=slowed", "constraint.weight.tail_energy=0.99999")
    )
    assert asked.constraint.requirements.subspace.reach == 0.99999
