"""LoRA: what trains, what is merged, and each defence's update against its dense form."""

from __future__ import annotations

import pytest
import torch

from cwac_lab.core.errors import LabError
from cwac_lab.defenses.cwac.weight import WeightConstraint
from cwac_lab.defenses.interface import Composite, Defense
from cwac_lab.defenses.literature.asft import AsFT
from cwac_lab.defenses.literature.l2 import L2
from cwac_lab.defenses.literature.safelora import SafeLoRA
from cwac_lab.defenses.literature.sppft import SPPFT
from cwac_lab.models.adapters import BASES, TARGETS, TuningConfig, attach
from cwac_lab.models.few_bits import dense as as_float
from cwac_lab.models.few_bits import keep_layout, quantized
from cwac_lab.models.sites import linears
from support import tiny
from support.held import HALF, LORA, QLORA, ROWS, context, same, train, weights
from support.held import start as start_of

# Dettmers et al. 2023, appendix E, to four places.
NEGATIVE, POSITIVE = [-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911], [0.0796, 0.1609, 0.2461, 0.3379]
NF4 = torch.tensor([*NEGATIVE, 0, *POSITIVE, 0.4407, 0.5626, 0.7230, 1])
ARCHITECTURES = ["llama", "qwen2", "gemma"]


def lively(defense, **changes):
    """Return a prepared model whose B is no longer zero."""
    model = tiny.model()
    prepared = context(model, defense)
    attach(model, TuningConfig(method="lora", rank=3, alpha=6, **changes), 0)
    defense.prepare(prepared)
    source = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for linear in linears(model, "all_linear"):
            if linear.adapter is not None:
                b = linear.adapter.lora_B["default"].weight
                b.copy_(0.1 * torch.randn(b.shape, generator=source))
    return model, prepared


def dense(model):
    """Return ``alpha / r B A`` by name, from PEFT's parameters."""
    return {
        linear.name: 2.0 * linear.adapter.lora_B["default"].weight @ linear.adapter.lora_A["default"].weight
        for linear in linears(model, "all_linear")
        if linear.adapter is not None
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("modules", TARGETS)
def test_only_the_targets_move_and_by_a_low_rank(architecture, modules):
    tuning = TuningConfig(method="lora", rank=3, alpha=6, modules=modules)
    start, found = (
        weights(tiny.model(architecture)),
        weights(train(Defense(), architecture=architecture, tuning=tuning)[0]),
    )
    assert start.keys() == found.keys()
    moved = {name for name in start if not torch.equal(start[name], found[name])}
    assert moved == {name for name in start if any(f"{path}.weight" in name for path in TARGETS[modules])}
    for name in moved:
        assert torch.linalg.matrix_rank(found[name] - start[name], atol=1e-5) == 3


def test_adapters_start_as_the_model_and_merge_into_what_they_compute():
    ids = torch.arange(12)[None]
    plain = tiny.model()
    model, _ = lively(Defense())
    assert not torch.allclose(model(ids).logits, plain(ids).logits)
    fresh = tiny.model()
    merge = attach(fresh, LORA, 0)
    assert torch.equal(fresh(ids).logits, plain(ids).logits)
    assert all("lora" in name for name, p in fresh.named_parameters() if p.requires_grad)
    for linear in linears(fresh, "all_linear"):
        torch.nn.init.normal_(linear.adapter.lora_B["default"].weight, std=0.1)
    before = fresh(ids).logits
    assert not torch.allclose(before, plain(ids).logits)
    merge()
    torch.testing.assert_close(fresh(ids).logits, before)
    assert fresh.state_dict().keys() == plain.state_dict().keys()
    assert not hasattr(fresh, "peft_config")


def test_the_seed_draws_the_factors_and_leaves_the_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(5)
        model = tiny.model()
        torch.manual_seed(5)
        attach(model, LORA, seed)
        assert torch.equal(torch.rand(1), expected)
        drawn.append(next(linears(model, "ffn")).adapter.lora_A["default"].weight)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("projection", ["gradient", "update", "both"])
def test_the_weight_constraint_equals_factors_that_read_projected_inputs(projection):
    """The reference feeds ``(I - V V^T) x`` into A by a hook, and projects A before it is merged."""
    defense = WeightConstraint(energy=0.9, projection=projection)
    model, prepared = train(defense, tuning=LORA)
    bases = {name: span.basis for name, span in prepared.subspace.spans.items()}

    class Fed(Defense):
        def prepare(self, context):
            self.pairs = []
            for linear in linears(context.model, "all_linear"):
                basis, a = bases[linear.site.name], linear.adapter.lora_A["default"]
                a.register_forward_pre_hook(lambda _, args, v=basis: args[0] - (args[0] @ v) @ v.T)
                self.pairs.append((basis, linear.adapter))

    fed, reference = Fed(), tiny.model()
    attach(reference, LORA, 0)
    fed.prepare(context(reference, fed))
    from cwac_lab.training.loop import fit
    from cwac_lab.training.settings import TrainerConfig

    chat = tiny.chat()
    settings = TrainerConfig(batch_size=4, learning_rate=1e-2, weight_decay=0.1, progress_bar=False)
    fit(reference, [chat.encode(*row) for row in ROWS], chat.pad_id, fed, settings, 0)
    start, found = tiny.model().state_dict(), model.state_dict()
    for (basis, adapter), linear in zip(fed.pairs, linears(model, "all_linear"), strict=True):
        b, a = adapter.lora_B["default"].weight, adapter.lora_A["default"].weight
        update = 2.0 * b @ (a - (a @ basis) @ basis.T)
        torch.testing.assert_close(found[linear.name] - start[linear.name], update, atol=2e-5, rtol=1e-3)
    assert defense.leak() < 1e-5
    assert defense.summary()["leak"] < 1e-5


def test_unconstrained_factors_leak():
    free = WeightConstraint(energy=0.9)
    model, prepared = train(Defense(), tuning=LORA)
    free.prepare(context(model.requires_grad_(True), free))
    free._start_weight = prepared.start_weight
    assert free.leak() > 0.1


def test_the_leak_is_known_while_adapters_are_apart():
    defense = WeightConstraint(energy=0.9)
    lively(defense)
    assert 0 < defense.leak() < 1e-5


def test_factors_outside_the_scope_are_frozen_or_free():
    start = weights(tiny.model())
    for trainable, moves in (("constrained", False), ("all", True)):
        defense = WeightConstraint(modules="ffn_out", trainable=trainable, energy=0.9)
        found = weights(train(defense, tuning=LORA)[0])
        name = "model.layers.0.self_attn.q_proj.weight"
        assert torch.equal(found[name], start[name]) is not moves
        assert not torch.equal(
            found["model.layers.0.mlp.down_proj.weight"], start["model.layers.0.mlp.down_proj.weight"]
        )


@pytest.mark.parametrize("mode", ["as_released", "exact"])
def test_asft_and_l2_penalise_the_dense_update(mode):
    l2, asft = L2(strength=1.5), AsFT(strength=2.5, mode=mode, rank=3)
    model, prepared = lively(Composite({"l2": l2, "asft": asft}))
    updates = dense(model)
    total = 1.5 * sum(update.square().sum() for update in updates.values())
    torch.testing.assert_close(l2.loss_terms(model, {}, 0)["l2"], total)
    expected = torch.zeros(())
    for linear in linears(model, "attention"):
        direction = prepared.start_weight(linear.name) - prepared.base_weight(linear.name)
        c = direction @ direction.T / direction.norm()
        if mode == "exact":
            left = torch.linalg.eigh(direction @ direction.T).eigenvectors[:, -3:]
            c = left @ left.T
        expected = expected + 2.5 * (updates[linear.name] - c @ updates[linear.name]).square().sum()
    found = asft.loss_terms(model, {}, 0)["asft"]
    torch.testing.assert_close(found, expected)
    adapter = next(linears(model, "attention")).adapter
    for factor in (adapter.lora_A["default"].weight, adapter.lora_B["default"].weight):
        got, wanted = (torch.autograd.grad(loss, factor, retain_graph=True)[0] for loss in (found, expected))
        torch.testing.assert_close(got, wanted)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(l2.loss_terms(model, {}, 0)["l2"], total)
        torch.testing.assert_close(asft.loss_terms(model, {}, 0)["asft"], expected)


@pytest.mark.parametrize("base", BASES)
def test_safelora_does_to_the_merged_update_what_the_released_code_does_to_b(base):
    """The reference takes the factors as trained, chooses by their product, and sets B to C B."""
    tuning = TuningConfig(method="lora", rank=3, alpha=6, modules="query_value", base=base)
    factors, held = {}, {}

    class Keep(Defense):
        def prepare(self, context):
            self.adapted = [linear for linear in linears(context.model, "attention") if linear.adapter is not None]
            held.update({linear.name: as_float(linear.module) for linear in self.adapted})

        def after_optimizer_step(self, step):
            for linear in self.adapted:
                b, a = linear.adapter.lora_B["default"].weight, linear.adapter.lora_A["default"].weight
                factors[linear.name] = b.detach().clone(), a.detach().clone()

    defense = SafeLoRA(share=0.5)
    found, prepared = train(Composite({"keep": Keep(), "safelora": defense}), tuning=tuning)
    expected = {}
    for name, (b, a) in factors.items():
        direction = prepared.start_weight(name) - prepared.base_weight(name)
        c = direction @ direction.T / direction.square().sum().sqrt()
        kept, whole = (c @ b) @ a, b @ a
        cosine = float((kept * whole).sum() / (kept.norm() * whole.norm()))
        expected[name] = (cosine, 2.0 * whole, 2.0 * kept)
    assert len(expected) == 4
    chosen = sorted(expected, key=lambda name: expected[name][0])[:2]
    reported = defense.summary()["safelora_projected"]
    assert set(reported) == set(chosen)
    for name, (cosine, whole, kept) in expected.items():
        update = found.state_dict()[name] - held[name]
        torch.testing.assert_close(update, kept if name in chosen else whole, atol=1e-5, rtol=1e-3)
        if name in chosen:
            assert reported[name]["cosine"] == pytest.approx(cosine, abs=1e-3)


def test_safelora_with_biases_grouped_heads_and_a_rank_as_large_as_the_model():
    width = tiny.model("qwen2").config.hidden_size
    tuning = TuningConfig(method="lora", rank=width, alpha=width, modules="query_value")
    defense = SafeLoRA(share=1.0, control="zero")
    start, found = weights(tiny.model("qwen2")), weights(train(defense, architecture="qwen2", tuning=tuning)[0])
    assert set(defense.summary()["safelora_projected"]) == {
        name for name in start if any(f"{path}.weight" in name for path in TARGETS["query_value"])
    }
    assert all(torch.allclose(start[name], found[name], atol=1e-6) for name in start)


def test_sppft_leaves_the_factors_of_its_block():
    start, found = weights(tiny.model()), weights(train(SPPFT(block=[0.0, 0.5]), tuning=LORA)[0])
    moved = {name for name in start if not torch.equal(start[name], found[name])}
    assert moved
    assert all("layers.1." in name for name in moved)


@pytest.mark.parametrize("twice", [True, False], ids=["scales-quantised", "scales-plain"])
def test_a_layer_in_few_bits_is_read_as_it_is_used_where_bitsandbytes_has_put_it_into_another_order(twice):
    """As it does on CPUs with AVX-512 and bfloat16, in eval mode; rows and blocks of them are of different scale."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu
    from bitsandbytes.nn import Linear4bit

    source = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 256, generator=source) * torch.logspace(-1, 1, 64)[:, None]
    weight[:, 64:128] *= 5
    layer = Linear4bit(256, 64, bias=False, quant_type="nf4", compress_statistics=twice)
    layer.load_state_dict({"weight": weight})
    layer = layer.to("cpu")
    held = as_float(layer)
    layer.support_avx512bf16_for_cpu = True
    layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )
    keep_layout(torch.nn.Sequential(layer))
    found = as_float(layer)
    assert not layer.support_avx512bf16_for_cpu
    assert (found - held).norm() < 0.01 * held.norm()
    assert ((found - held).norm(dim=1) < 0.1 * held.norm(dim=1)).all()
    inputs = torch.randn(3, 256, generator=source)
    torch.testing.assert_close(layer.eval()(inputs), inputs @ found.T, atol=1e-3, rtol=1e-3)
    assert torch.equal(as_float(layer), found)


@pytest.mark.parametrize("tuning", [HALF, QLORA], ids=lambda tuning: tuning.base)
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_weights_in_few_bits_stay_and_what_is_merged_is_exact(tuning, architecture):
    """The reference adds the factors to the weights as they were held, in float32."""
    start = {name: value.float() for name, value in weights(start_of(architecture, tuning)).items()}
    held, factors, sizes = {}, {}, []
    defense = WeightConstraint(energy=0.9)

    class Watch(Defense):
        def prepare(self, context):
            self.linears = list(linears(context.model, "all_linear"))
            held.update({linear.name: as_float(linear.module) for linear in self.linears})
            sizes.extend(linear.module.weight.nbytes / held[linear.name].nbytes for linear in self.linears)

        def after_optimizer_step(self, step):
            for linear in self.linears:
                assert all(factor.dtype == torch.float32 for factor in linear.trained)
                assert torch.equal(as_float(linear.module), held[linear.name])
                factors[linear.name] = tuple(factor.detach().clone() for factor in linear.factors())

    model, _ = train(Composite({"watch": Watch(), "weight": defense}), architecture=architecture, tuning=tuning)
    found = weights(model)
    assert found.keys() == start.keys()
    assert sizes == [1 / 2 if tuning is HALF else 1 / 8] * 14
    assert all(value.dtype == torch.float32 for value in found.values())
    for name, value in found.items():
        if name not in held:
            assert torch.equal(value, start[name])
            continue
        left, right = factors[name]
        torch.testing.assert_close(value, held[name] + left @ right)
        assert (held[name] - start[name]).norm() <= (0 if tuning is HALF else 0.12) * start[name].norm()
    assert 0 < defense.leak() < 1e-5
    assert type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear


def test_4_bit_numbers_are_the_nearest_of_their_block():
    """The reference picks, for every weight over its block's largest, the nearest of the 16 values of NF4."""
    layer = torch.nn.Linear(128, 48)
    found = as_float(quantized(layer))
    blocks = layer.weight.detach().reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    expected = NF4[(blocks / scale)[..., None].sub(NF4).abs().argmin(-1)] * scale
    # The scales themselves are held in 8 bits; a weight half-way between two values may take either.
    near = found.isclose(expected.view(48, 128), atol=0.01 * float(scale.max()), rtol=0.01)
    assert near.float().mean() > 0.995


def test_4_bit_blocks_do_not_reach_over_rows():
    with pytest.raises(LabError, match=r"tuning.base=nf4: a layer of width 32; accepted on the CPU: multiples of 64"):
        attach(tiny.model(), QLORA, 0)


def test_a_run_in_which_nothing_trains_is_refused():
    tuning = TuningConfig(method="lora", modules="attention")
    with pytest.raises(LabError, match="nothing is left to train"):
        train(WeightConstraint(modules="ffn_out", energy=0.9), tuning=tuning)


def test_a_merged_model_is_saved_as_a_plain_one(tmp_path):
    from transformers import AutoModelForCausalLM

    model, _ = train(Defense(), tuning=LORA)
    model.save_pretrained(tmp_path)
    assert same(weights(AutoModelForCausalLM.from_pretrained(tmp_path)), weights(model))
