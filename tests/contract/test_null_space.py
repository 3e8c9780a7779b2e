"""``tuning=null_space``: factors that train all that the weight constraint leaves free, and nothing else."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.utils import parametrize

from cwac_lab.core.errors import LabError
from cwac_lab.data.batches import collate
from cwac_lab.defenses.cwac import null_space
from cwac_lab.defenses.cwac.null_space import attach as constrained
from cwac_lab.defenses.cwac.null_space import free_directions
from cwac_lab.defenses.cwac.subspace import reading
from cwac_lab.defenses.cwac.subspace.solvers import Covariance, Gram, Randomized
from cwac_lab.defenses.cwac.subspace.span import Span
from cwac_lab.defenses.cwac.weight import WeightConstraint
from cwac_lab.defenses.interface import Defense
from cwac_lab.models import lora, shipped
from cwac_lab.models.adapters import attach, factors, held_weight
from cwac_lab.models.answers import answer_loss
from cwac_lab.models.sites import linears
from support import tiny
from support.held import FULL, LORA, NULL_SPACE, ROWS, Kill, Killed, assert_moved_alike, context, same, train, weights
from support.held import start as start_of

ARCHITECTURES = ["llama", "qwen2", "gpt2", "phi3"]


def attached(architecture="llama", tuning=NULL_SPACE, energy=0.9, **settings):
    """Return a model with the factors of a prepared constraint, what it was prepared with, and the merge."""
    model, defense, chat = start_of(architecture, tuning), WeightConstraint(energy=energy, **settings), tiny.chat()
    prepared, rows = context(model, defense), [chat.encode(*row).input_ids for row in ROWS]
    merge = constrained(model, tuning, 0, defense.requirements.subspace, prepared.subspace, rows, chat.pad_id)
    defense.prepare(prepared)
    return model, defense, prepared, merge


def batch():
    chat = tiny.chat()
    return collate([chat.encode(*row) for row in ROWS[:4]], chat.pad_id)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_only_the_left_factors_train_and_the_model_starts_as_it_was(architecture):
    ids = torch.arange(12)[None]
    with torch.no_grad():
        before = start_of(architecture, FULL)(ids).logits
    model, defense, prepared, _ = attached(architecture)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name in dict(model.named_parameters()) if "lora_B" in name}
    for held in defense._held:
        left, right = held.linear.factors()
        span = prepared.subspace.spans[held.linear.site.name]
        assert right.shape == (span.width - span.rank, span.width)
        assert left.shape[1] == span.width - span.rank
        torch.testing.assert_close(right @ right.T, torch.eye(len(right)), atol=1e-5, rtol=0)
        assert (right @ span.basis).abs().max() < 1e-5


def test_gradient_descent_on_them_is_descent_by_projected_gradients():
    """The reference moves whole weights, ``W - r G (I - V V^T)``: without an optimizer's moments both are the same."""
    model, _, prepared, merge = attached()
    dense, rate = tiny.model(), 0.1
    for _ in range(3):
        answer_loss(model, batch()).backward()
        answer_loss(dense, batch()).backward()
        with torch.no_grad():
            for linear in linears(model, "all_linear"):
                left, span = linear.left, prepared.subspace.spans[linear.site.name]
                scale = math.sqrt(span.width / (span.width - span.rank))
                left -= rate / scale**2 * left.grad
                left.grad = None
            for linear in linears(dense, "all_linear"):
                v = prepared.subspace.spans[linear.site.name].basis.double()
                gradient = linear.weight.grad.double()
                linear.parameter.sub_(rate * (gradient - gradient @ v @ v.T).float())
            dense.zero_grad()
    merge()
    start, found, expected = weights(tiny.model()), weights(model), weights(dense)
    assert sum(float((found[name] - start[name]).square().sum()) for name in found) > 1e-6
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=2e-6, rtol=1e-4)


class _Coordinates(torch.nn.Module):
    """``W_0 + sqrt(d / c) B U^T`` as one dense weight."""

    def __init__(self, start, basis):
        super().__init__()
        self.register_buffer("start", start)
        self.register_buffer("basis", math.sqrt(basis.shape[0] / basis.shape[1]) * basis)

    def forward(self, coordinates):
        return self.start + coordinates @ self.basis.T

    def right_inverse(self, weight):
        return torch.zeros(len(weight), self.basis.shape[1])


def test_training_equals_that_of_coordinates_in_dense_weights():
    """The reference has no factors beside the weights: each weight is computed whole from its coordinates."""

    class Dense(Defense):
        def prepare(self, prepared):
            probe = WeightConstraint(energy=0.9)
            spans = context(prepared.model, probe).subspace.spans
            prepared.model.requires_grad_(False)
            for linear in list(linears(prepared.model, "all_linear")):
                basis = spans[linear.site.name].complement
                made = _Coordinates(linear.weight.detach().clone(), basis)
                parametrize.register_parametrization(linear.module, "weight", made)
                linear.module.parametrizations.weight.original.requires_grad_(True)

        def after_training(self, model):
            for linear in list(linears(model, "all_linear")):
                parametrize.remove_parametrizations(linear.module, "weight")

    found, _ = train(WeightConstraint(energy=0.9), tuning=NULL_SPACE)
    expected, _ = train(Dense())
    assert_moved_alike(weights(found), weights(expected), weights(tiny.model()))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("base", ["float32", "bfloat16"])
@pytest.mark.parametrize("n", [None, 2])
def test_what_is_merged_has_no_part_along_protected_directions(architecture, base, n):
    tuning = ranked(n, base=base)
    defense = WeightConstraint(energy=0.9)
    model, prepared = train(defense, architecture=architecture, tuning=tuning)
    assert defense.summary()["leak"] < 1e-4
    moved = 0.0
    for linear in linears(model, "all_linear"):
        update = linear.weight.detach().double() - linear.of(prepared.start_weight(linear.name)).double()
        span = prepared.subspace.spans[linear.site.name]
        moved += float(update.norm())
        assert float((update @ span.basis.double()).norm()) <= 1e-4 * float(update.norm()) + 1e-7
    assert moved > 1e-2
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def read_alone(model, rows, normalize):
    """Return, by layer, the second moment of what it reads, from plain hooks and one row at a time."""
    moments, handles = {}, []
    for linear in linears(model, "all_linear"):

        def hook(_, args, name=linear.name):
            x = args[0][0].double()
            x = x / x.norm(dim=1, keepdim=True) if normalize else x
            moments[name] = moments.get(name, 0) + x.T @ x

        handles.append(linear.module.register_forward_pre_hook(hook))
    with torch.no_grad():
        for ids in rows:
            model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return moments


def ranked(n, **changes):
    return replace(NULL_SPACE, free_directions=n, **changes)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("solver", "normalize", "memory"),
    [(Covariance, True, 2**33), (Covariance, False, 2**12), (Gram, True, 2**12), (Randomized, True, 2**33)],
)
def test_those_that_are_chosen_hold_most_of_the_rows(architecture, solver, normalize, memory, monkeypatch):
    monkeypatch.setattr(null_space, "cheapest", lambda *_: solver)
    monkeypatch.setattr(reading, "MEMORY", memory)
    model, chat = start_of(architecture, FULL), tiny.chat()
    defense = WeightConstraint(energy=0.9, normalize=normalize)
    spec, subspace = defense.requirements.subspace, context(model, defense).subspace
    rows = [chat.encode(*row).input_ids for row in ROWS]
    found = free_directions(model, spec, subspace, ranked(3), rows, pad_id=chat.pad_id)
    moments = read_alone(model, rows, normalize)
    told_apart = set()
    for linear in linears(model, "all_linear"):
        v = subspace.spans[linear.site.name].basis.double()
        without = torch.eye(len(v), dtype=torch.float64) - v @ v.T
        values, vectors = torch.linalg.eigh(without @ moments[linear.name] @ without)
        basis = found[linear.name.removesuffix(".weight")].double()
        assert basis.shape[1] == min(3, len(v) - v.shape[1])
        torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1], dtype=torch.float64), atol=1e-5, rtol=0)
        assert (v.T @ basis).abs().max() < 1e-5
        if basis.shape[1] == 3 and values[-3] > 1.05 * values[-4]:  # where the three leading ones are told apart
            told_apart.add(linear.site)
            expected = vectors[:, -3:] @ vectors[:, -3:].T
            torch.testing.assert_close(basis @ basis.T, expected, atol=1e-3, rtol=0)
    assert len(told_apart) > 3


def test_as_many_as_are_free_are_all(monkeypatch):
    model, chat, defense = tiny.model(), tiny.chat(), WeightConstraint(energy=0.9)
    spec, subspace = defense.requirements.subspace, context(model, defense).subspace
    rows = [chat.encode(*row).input_ids for row in ROWS]
    for linear in linears(model, "all_linear"):
        free = subspace.spans[linear.site.name].complement
        name, n = linear.name.removesuffix(".weight"), free.shape[1]
        assert torch.equal(free_directions(model, spec, subspace, ranked(n), rows)[name], free)
        fewer = free_directions(model, spec, subspace, ranked(n - 1), rows, pad_id=chat.pad_id)[name]
        assert fewer.shape == (subspace.spans[linear.site.name].width, n - 1)


def test_rows_with_few_tokens_have_few_directions_and_none_are_an_error():
    model, chat, defense = tiny.model(), tiny.chat(), WeightConstraint(energy=0.9)
    spec, subspace = defense.requirements.subspace, context(model, defense).subspace
    found = free_directions(model, spec, subspace, ranked(8), [[1, 2, 3]], pad_id=chat.pad_id)
    assert {basis.shape[1] for basis in found.values()} <= {1, 2, 3}
    with pytest.raises(ValueError, match="no training rows"):
        free_directions(model, spec, subspace, ranked(8))


def test_no_more_than_some_tokens_are_read_and_the_seed_draws_the_rows(monkeypatch):
    model, chat, defense = tiny.model(), tiny.chat(), WeightConstraint(energy=0.9)
    spec, subspace = defense.requirements.subspace, context(model, defense).subspace
    rows = [chat.encode(*row).input_ids for row in ROWS]
    monkeypatch.setattr(null_space, "READ", 2 * len(rows[0]))

    def found(seed, rows=rows):
        return free_directions(model, spec, subspace, ranked(2), rows, seed, chat.pad_id)

    first, again, other = found(0), found(0), found(1)
    assert same(first, again)
    assert not same(first, other)
    drawn = null_space._drawn(rows, 0)
    assert 1 < len(drawn) < 4
    monkeypatch.setattr(null_space, "READ", 10**6)
    assert same(found(0, drawn), first)


def test_weights_in_4_bits_are_kept_beside_them():
    tuning = replace(NULL_SPACE, base="nf4")
    model, _, _, merge = attached(tuning=tuning)
    before = {linear.name: held_weight(linear) for linear in linears(model, "all_linear")}
    for linear in linears(model, "all_linear"):
        torch.nn.init.normal_(linear.left, std=0.1)
    updates = {linear.name: torch.matmul(*linear.factors()).detach() for linear in linears(model, "all_linear")}
    merge()
    for linear in linears(model, "all_linear"):
        torch.testing.assert_close(linear.weight.detach(), before[linear.name] + updates[linear.name])


def test_a_layer_of_which_nothing_is_free_has_no_factors_and_none_at_all_is_an_error(tmp_path):
    model = tiny.model()
    width = model.config.hidden_size
    defense, tuning = WeightConstraint(energy=0.9), replace(NULL_SPACE, modules="ffn")
    free = free_directions(model, defense.requirements.subspace, context(model, defense).subspace, tuning)
    assert all("mlp" in name for name in free)
    closed = {name: basis[:, :0] if "up_proj" in name else basis for name, basis in free.items()}
    attach(model, tuning, 0, closed)
    adapted = {name.rpartition(".lora_A")[0] for name in factors(model) if ".lora_A" in name}
    assert adapted == {name for name in free if "up_proj" not in name}
    shipped.save_adapter(model, tuning, tmp_path, torch.float32, "base")
    assert len(lora.check(tiny.model(), tmp_path)) == len(adapted)  # no factors are missed
    with pytest.raises(LabError, match="leaves nothing to train"):
        attach(tiny.model(), NULL_SPACE, 0, {name: torch.zeros(width, 0) for name in free})


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    settings = {"tuning": NULL_SPACE, "checkpoint_every_n_steps": 2, "epochs": 2}
    whole, _ = train(WeightConstraint(energy=0.9), **settings)
    with pytest.raises(Killed):
        train(WeightConstraint(energy=0.9), **settings, checkpoint=tmp_path / "kept", callbacks=[Kill(7)])
    again, _ = train(WeightConstraint(energy=0.9), **settings, checkpoint=tmp_path / "kept")
    assert same(weights(again), weights(whole))


def test_a_checkpoint_holds_the_basis_that_its_factors_are_of(tmp_path, monkeypatch):
    settings = {"tuning": NULL_SPACE, "checkpoint_every_n_steps": 2, "checkpoint": tmp_path / "kept"}
    whole, _ = train(WeightConstraint(energy=0.9), tuning=NULL_SPACE)
    with pytest.raises(Killed):
        train(WeightConstraint(energy=0.9), **settings, callbacks=[Kill(3)])

    def turned(span):
        basis = complement.__get__(span)
        return basis @ torch.linalg.qr(torch.randn(basis.shape[1], basis.shape[1])).Q

    complement = Span.complement
    monkeypatch.setattr(Span, "complement", property(turned))
    again, _ = train(WeightConstraint(energy=0.9), **settings)
    assert same(weights(again), weights(whole))


def test_layers_that_do_not_train_are_not_in_the_leak():
    tuning = replace(NULL_SPACE, modules="ffn", base="bfloat16")
    defense = WeightConstraint(energy=0.9)
    model, prepared = train(defense, tuning=tuning)
    exact = {linear.name: 1e-3 * torch.randn(linear.weight.shape) for linear in linears(model, "attention")}
    defense._start_weight = lambda name: prepared.start_weight(name) + exact.get(name, 0)  # what bfloat16 rounded away
    assert defense.leak() < 1e-4


def test_a_factor_that_is_frozen_by_others_is_projected_once():
    model, defense = tiny.model(), WeightConstraint(energy=0.9)
    prepared = context(model, defense)
    attach(model, LORA, 0)
    for linear in linears(model, "all_linear"):
        linear.adapter.lora_A.requires_grad_(False)
    drawn = {linear.name: linear.factors()[1].clone() for linear in linears(model, "all_linear")}
    defense.prepare(prepared)
    for held in defense._held:
        a = held.linear.adapter.lora_A["default"]
        v, was = held.span.basis, drawn[held.linear.name]
        assert not parametrize.is_parametrized(a)
        assert not a.weight.requires_grad
        torch.testing.assert_close(a.weight, was - was @ v @ v.T, atol=1e-5, rtol=1e-4)
