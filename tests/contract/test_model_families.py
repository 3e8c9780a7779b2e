"""Every family of models under the project's constraints, with LoRA and without: what is to be held is held."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from cwac_lab.data.batches import pad
from cwac_lab.defenses.cwac.activation import ActivationConstraint
from cwac_lab.defenses.cwac.weight import WeightConstraint
from cwac_lab.defenses.interface import Composite
from cwac_lab.models import lora, shipped
from cwac_lab.models.adapters import TARGETS, attach, targets
from cwac_lab.models.sites import decoder_layers, is_linear, linears
from cwac_lab.run.estimate import trained_parameters
from support import tiny
from support.cover import table
from support.held import FULL, LORA, ROWS, context, start, train, weights

MIXTURES = ("qwen3_moe", "mixtral", "olmoe")
FAMILIES = (*tiny.ARCHITECTURES, *MIXTURES)


def parts(constraint):
    made = {
        "weight": WeightConstraint(energy=0.9, trainable="all"),
        "activation": ActivationConstraint(strength=300.0, depths=[0.5], n_latents=4, batch_size=7, every_n_steps=1),
    }
    return {name: part for name, part in made.items() if constraint in (name, "coupled")}


def moves(model, before, scope="all_linear"):
    """Return every matrix of a scope with how far it is from where it was, in float64."""
    after = weights(model)
    return [(each, each.of(after[each.name] - before[each.name]).double()) for each in linears(model, scope)]


def held_latents(model, prepared):
    """Return the latents that are held, before their activation, at the last token of the reference prompts."""
    (features,) = prepared.features
    ids, mask = pad(prepared.reference, 0)
    seen = []
    with decoder_layers(model)[1].register_forward_hook(lambda _, __, out: seen.append(out)), torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    x = (seen[0][0] if isinstance(seen[0], tuple) else seen[0])[torch.arange(len(ids)), mask.sum(1) - 1]
    return x @ features.weight[:, features.latents]


@table(
    strength=2,
    every=4,
    family=FAMILIES,
    constraint=("none", "weight", "activation", "coupled"),
    tuning=("full", "lora"),
)
def test_what_a_constraint_holds_in_a_family_is_held(family, constraint, tuning):
    way = FULL if tuning == "full" else LORA
    held = parts(constraint)
    settings = {"architecture": family, "tuning": way, "rows": ROWS[:12], "epochs": 3, "learning_rate": 3e-3}
    model, prepared = train(Composite(held), **settings)
    before = weights(start(family, way))
    for matrix, update in moves(model, before):
        assert update.any() or matrix.site.expert is not None, matrix.name
        if "weight" in held:
            basis = prepared.subspace.spans[matrix.site.name].basis.double()
            assert 0 < basis.shape[1] < len(basis)
            assert (update @ basis).norm() <= 1e-4 * update.norm(), matrix.site.name
    assert weights(model).keys() == before.keys()
    if "activation" in held:
        free, _ = train(Composite(), **settings)
        was = held_latents(start(family, way), prepared)
        drift, free_drift = ((held_latents(each, prepared) - was).norm() for each in (model, free))
        assert drift < 0.5 * free_drift  # 0.02 to 0.35 were seen


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_of_a_family_is_constrained(family):
    model = start(family, FULL)
    layers = {f"{name}.weight" for name, each in model.named_modules() if is_linear(each)}
    layers |= {name for name, each in model.named_parameters() if each.ndim == 3}
    found = list(linears(model, "all_linear"))
    assert {matrix.name for matrix in found} == layers - {"lm_head.weight"}
    held = sum(model.get_parameter(name).numel() for name in {matrix.name for matrix in found})
    assert sum(matrix.weight.numel() for matrix in found) == held


@pytest.mark.parametrize("family", ["gpt2", *MIXTURES, "phi3"])
def test_a_saved_adapter_is_what_peft_computes_and_what_is_merged(family, tmp_path):
    """On the untouched base: by PEFT, by what merges a start's adapter, and by the run itself, none of it along V."""
    base, ids = start(family, FULL), torch.arange(3, 40)[None]
    base.save_pretrained(tmp_path / "base")
    model, defense = start(family, FULL), WeightConstraint(energy=0.9)
    prepared, before = context(model, defense), weights(model)
    merge = attach(model, LORA, 0)
    defense.prepare(prepared)
    source = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=source)
    shipped.save_adapter(model, LORA, tmp_path / "adapter", torch.float32, str(tmp_path / "base"))
    logits = model(ids).logits
    assert (logits - base(ids).logits).abs().max() > 0.05
    merge()
    defense.after_training(model)
    added = start(family, FULL)
    lora.settings(tmp_path / "adapter")
    lora.add(added, tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of factors that are not in the file
        theirs = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    for each in (model, added, theirs):
        torch.testing.assert_close(each(ids).logits, logits, atol=1e-4, rtol=1e-4)
    for matrix, update in moves(model, before):
        basis = prepared.subspace.spans[matrix.site.name].basis.double()
        assert (update @ basis).norm() < 1e-5 * update.norm(), matrix.site.name
        assert torch.linalg.matrix_rank(update, atol=1e-4) <= LORA.rank
    assert 0 < defense.leak() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_as_many_parameters_are_said_to_train_as_train(family):
    model = start(family, FULL)
    for way in (FULL, LORA):
        said = trained_parameters(start(family, FULL), way)
        attach(model, way, 0)
        assert said == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def test_a_layer_that_joins_others_stands_in_their_place():
    model = tiny.model("phi3")
    found = {scope: targets(model, scope) for scope in TARGETS}
    assert found == {
        "query_value": ["q_proj", "v_proj"],  # a part of what is joined is not there
        "ffn_out": ["down_proj"],
        "ffn": ["gate_up_proj", "down_proj"],
        "attention": ["qkv_proj", "o_proj"],
        "all_linear": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    }


def test_the_rows_of_a_joined_layer_are_held_as_those_of_its_parts_are():
    """The same weights as Llama's, apart, see the same inputs: they are held in the same directions."""
    joined, apart = (tiny.model(family, sliding_window=None, rms_norm_eps=1e-5) for family in ("phi3", "llama"))
    apart.load_state_dict(_taken_apart(joined))
    ids = torch.arange(3, 40)[None]
    torch.testing.assert_close(joined(ids).logits, apart(ids).logits, atol=1e-5, rtol=1e-5)
    assert [m.site for m in linears(joined, "attention")] == list(
        dict.fromkeys(m.site for m in linears(apart, "attention"))
    )


def _taken_apart(model):
    """Return the weights of a Phi-3 by the names of Llama."""
    rows = {"qkv_proj": (32, 16, 16), "gate_up_proj": (48, 48)}
    names = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    found = {}
    for name, value in model.state_dict().items():
        joined = next((each for each in names if each in name), None)
        if joined is None:
            found[name] = value
            continue
        for part, block in zip(names[joined], value.split(rows[joined]), strict=True):
            found[name.replace(joined, part)] = block
    return found
