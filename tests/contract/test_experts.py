"""A mixture of experts: every expert is constrained by the tokens that it reads, and by no others.

The reference computes routing and hidden activations prompt by prompt, expert by expert, from the weights alone.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.nn.functional import silu

from cwac_lab.core import linalg
from cwac_lab.core.errors import ConfigError
from cwac_lab.data.batches import collate
from cwac_lab.defenses.cwac.subspace import basis, coverage, reading
from cwac_lab.defenses.cwac.subspace.span import Span
from cwac_lab.defenses.cwac.subspace.spec import Subspace, SubspaceSpec
from cwac_lab.defenses.cwac.weight import WeightConstraint
from cwac_lab.models.adapters import attach
from cwac_lab.models.answers import answer_loss
from cwac_lab.models.architecture import Scope, Use, check
from cwac_lab.models.capture import layer_outputs, site_inputs
from cwac_lab.models.sites import linears
from cwac_lab.training.loop import fit
from cwac_lab.training.settings import TrainerConfig
from support import tiny
from support.held import FULL, LORA, PROMPTS, ROWS, context, start, train, weights

MIXTURES = ("qwen3_moe", "mixtral", "olmoe")
MANY = {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def read_by_experts(model, prompts, begin=0):
    """Return by site name all that an expert's matrices read of some prompts from a token on, in float64."""
    found = {}
    for prompt in prompts:
        seen = []
        hooks = [
            layer.mlp.register_forward_pre_hook(lambda _, x, seen=seen: seen.append(x[0][0]))
            for layer in model.model.layers
        ]
        with torch.no_grad():
            model(torch.tensor([prompt]))
        for hook in hooks:
            hook.remove()
        for number, (x, layer) in enumerate(zip(seen, model.model.layers, strict=True)):
            chosen = (x @ layer.mlp.gate.weight.T).softmax(-1).topk(model.config.num_experts_per_tok).indices
            for token, experts in zip(x[begin:], chosen[begin:].tolist(), strict=True):
                for expert in experts:
                    gate, up = (layer.mlp.experts.gate_up_proj[expert] @ token).chunk(2)
                    name = f"layers.{number}.experts.{expert}"
                    found.setdefault(f"{name}.ffn_in", []).append(token)
                    found.setdefault(f"{name}.ffn_out", []).append(silu(gate) * up)
    return {name: torch.stack(rows).detach().double() for name, rows in found.items()}


def prompts_of(*texts):
    return [tiny.chat().prompt_ids(text) for text in texts]


@pytest.mark.parametrize("at_once", [1, 2**30])  # what accumulates together
@pytest.mark.parametrize(("normalize", "tokens"), [(True, "all"), (False, "all"), (False, "no_sinks")])
@pytest.mark.parametrize("family", MIXTURES)
def test_an_expert_is_held_on_the_tokens_that_are_routed_to_it(family, normalize, tokens, at_once, monkeypatch):
    monkeypatch.setattr(reading, "MEMORY", at_once)
    model, prompts = tiny.lively(family, **tiny.MIXTURES[family]), prompts_of(*PROMPTS)
    spec = SubspaceSpec("ffn", 0.9, None, tokens, normalize)
    found = dict(basis.leading(model, prompts, spec, 0, batch_size=3))
    expected = read_by_experts(model, prompts, begin=tokens == "no_sinks")  # no other tokens are sinks here
    assert list(found) == list(dict.fromkeys(matrix.site.name for matrix in linears(model, "ffn")))
    assert len({len(rows) for rows in expected.values()}) > 2  # experts read unlike numbers of tokens
    for name, rows in expected.items():
        rows = rows / rows.norm(dim=1, keepdim=True) if normalize else rows
        values, vectors = torch.linalg.eigh(rows.T @ rows)
        rank = int((values.flip(0).cumsum(0) < 0.9 * values.sum()).sum()) + 1
        v, ours = vectors.flip(1)[:, :rank], found[name].basis.double()
        assert ours.shape[1] == rank
        torch.testing.assert_close(ours @ ours.T, v @ v.T, atol=2e-4, rtol=0)
        assert found[name].kept == pytest.approx(float(values.flip(0)[:rank].sum() / values.sum()), rel=1e-4)


@pytest.mark.parametrize("rank", [None, 5])
def test_an_expert_that_reads_no_token_is_free_and_counted(rank):
    model, prompts = tiny.model("qwen3_moe", **MANY), prompts_of("how?")
    spec = SubspaceSpec("ffn", 0.9 if rank is None else None, rank, "all", True)
    found = dict(basis.leading(model, prompts, spec, 0))
    expected = read_by_experts(model, prompts)
    free = {name for name in found if name not in expected}
    assert free
    assert {name for name, each in found.items() if not each.basis.shape[1]} == free
    for name, rows in expected.items():  # fewer tokens than the rank have no other directions
        assert found[name].basis.shape[1] <= (len(rows) if rank is None else min(rank, len(rows)))
    subspace = basis.subspace_of(found.items())
    assert basis.unread(subspace) == (len(free) / 2, 32)
    within = [each.kept for name, each in found.items() if name in expected]
    assert coverage.covered(model, prompts, subspace, spec, 0) == pytest.approx(sum(within) / len(within), rel=1e-4)
    dense = Subspace({"layers.0.ffn_in": Span(torch.zeros(4, 1))}, {"layers.0.ffn_in": 0.9})
    assert basis.unread(dense) == (0, 0)


def test_what_experts_are_said_to_read_is_what_they_read_with_factors_too():
    model, prompts = start("qwen3_moe", FULL), prompts_of("how do I")
    expected, seen = read_by_experts(model, prompts), {}
    attach(model, LORA, 0)
    with torch.no_grad(), site_inputs(model, "ffn", lambda site, x, read: seen.update({site.name: x[read]})):
        model(torch.tensor(prompts))
    assert seen.keys() == expected.keys()
    for name, rows in expected.items():
        torch.testing.assert_close(seen[name].double(), rows, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", *MIXTURES])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_gradients_are_those_of_the_plain_model_projected(family, share):
    """Of every expert, and of weights that are held turned, off the leading directions of its own basis."""
    plain, chat = start(family, FULL).eval(), tiny.chat()
    held, defense = copy.deepcopy(plain), WeightConstraint(energy=0.9, gradient_share=share, trainable="all")
    prepared = context(held, defense)
    defense.prepare(prepared)
    batch = collate([chat.encode(*row) for row in ROWS[:6]], chat.pad_id)
    for model in (plain, held):
        answer_loss(model, batch).backward()
    of_plain = {name: parameter.grad for name, parameter in plain.named_parameters()}
    apart = of_plain.keys() - {matrix.name for matrix in linears(held, "all_linear")}  # routers among them
    for matrix in linears(held, "all_linear"):
        v = prepared.subspace.spans[matrix.site.name].basis
        v = v[:, : math.ceil(share * v.shape[1])]
        gradient = matrix.of(of_plain[matrix.name])
        expected = gradient - gradient @ v @ v.T
        torch.testing.assert_close(matrix.of(matrix.parameter.grad), expected, atol=1e-6, rtol=1e-4)
    for name in apart:
        torch.testing.assert_close(held.get_parameter(name).grad, of_plain[name], atol=1e-6, rtol=1e-4)
    defense.release(held)
    held.zero_grad()
    answer_loss(held, batch).backward()
    for name, parameter in held.named_parameters():
        torch.testing.assert_close(parameter.grad, of_plain[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("tuning", [FULL, LORA], ids=lambda tuning: tuning.method)
def test_the_answers_of_experts_to_the_reference_are_kept_and_their_router_is_frozen(tuning):
    """At energy 1 no linear layer moves on what it read, so every token goes to the same experts as before."""
    prompts = prompts_of("one request", "a second one, please")
    wide = {**tiny.MIXTURES["qwen3_moe"], "hidden_size": 128, "moe_intermediate_size": 96, "head_dim": 32}
    model, begin, chat = tiny.model("qwen3_moe", **wide), tiny.model("qwen3_moe", **wide), tiny.chat()
    before, defense = weights(model), WeightConstraint(energy=1.0)
    prepared = context(model, defense, prompts)
    merge = attach(model, tuning, 0)
    defense.prepare(prepared)
    options = TrainerConfig(batch_size=4, learning_rate=3e-3, progress_bar=False)
    fit(model, [chat.encode(*row) for row in ROWS], chat.pad_id, defense, options, 0)
    merge()
    defense.after_training(model)
    for prompt in prompts:
        ids = torch.tensor([prompt])
        torch.testing.assert_close(model(ids).logits, begin(ids).logits, atol=2e-3, rtol=0)
    other, after = torch.tensor(prompts_of("quite another sentence")), weights(model)
    assert (model(other).logits - begin(other).logits).abs().max() > 0.05
    assert all(torch.equal(after[name], before[name]) for name in before if "gate.weight" in name)
    assert sum(not torch.equal(after[name], before[name]) for name in before if "experts" in name) == 4
    assert defense.summary()["leak"] < 1e-5


def test_the_leak_of_experts_is_that_of_the_dense_updates():
    defense = WeightConstraint(energy=0.9, projection="gradient", trainable="all")
    model, prepared = train(defense, architecture="mixtral", rows=ROWS[:8])
    before, after, sums = weights(start("mixtral", FULL)), weights(model), torch.zeros(2, dtype=torch.float64)
    for matrix in linears(model, "all_linear"):
        update = matrix.of(after[matrix.name] - before[matrix.name])
        sums += torch.tensor(linalg.leak(update, prepared.subspace.spans[matrix.site.name].basis), dtype=torch.float64)
    assert defense.leak() == pytest.approx(float((sums[0] / sums[1]).sqrt()), rel=1e-5)
    assert defense.leak() > 1e-3


@pytest.mark.parametrize("family", ["gpt2", "qwen3_moe"])
def test_what_is_no_linear_layer_is_not_sharded(family):
    model, scope = start(family, FULL), Scope("constraint.weight.modules", "ffn", "ffn", "constraint=none")
    check(model, Use((scope,)))
    check(start("llama", FULL), Use((scope,), sharded=True))
    with pytest.raises(ConfigError, match=r"trainer.strategy=fsdp: accepted: ddp; mlp\..* of .* is no linear layer"):
        check(model, Use((scope,), sharded=True))


def test_what_drops_out_in_training_is_no_drift():
    model = start("gpt2", FULL)
    ids, mask = torch.arange(3, 40)[None], torch.ones(1, 37, dtype=torch.long)
    expected = layer_outputs(model, [0, 1], ids, mask)
    model.train()
    assert not torch.allclose(model(ids).logits, model(ids).logits)
    found = layer_outputs(model, [0, 1], ids, mask)
    assert model.training
    for layer in (0, 1):
        torch.testing.assert_close(found[layer], expected[layer])
