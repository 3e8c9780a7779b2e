"""Every family of models under the project's constraints, with LoRA and without: what is to be held is held."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cwac_lab.data.batches import pad
from cwac_lab.defenses.cwac.activation import ActivationConstraint
from cwac_lab.defenses.cwac.weight import WeightConstraint
from cwac_lab.defenses.interface import Composite
from cwac_lab.models.adapters import TARGETS, targets
from cwac_lab.models.sites import decoder_layers, linears
from support import tiny
from support.cover import table
from support.held import FULL, LORA, ROWS, start, train, weights

# Of a mixture of experts the attention is constrained; its experts are free, or without factors.
SCOPE = {"qwen3_moe": "attention", "mixtral": "attention"}
FAMILIES = (*tiny.ARCHITECTURES, *SCOPE)


def parts(scope, constraint):
    made = {
        "weight": WeightConstraint(energy=0.9, modules=scope, trainable="all"),
        "activation": ActivationConstraint(strength=300.0, depths=[0.5], n_latents=4, batch_size=7, every_n_steps=1),
    }
    return {name: part for name, part in made.items() if constraint in (name, "coupled")}


def held_latents(model, prepared):
    """Return the latents that are held, before their activation, at the last token of the reference prompts."""
    (features,) = prepared.features
    ids, mask = pad(prepared.reference, 0)
    seen = []
    with decoder_layers(model)[1].register_forward_hook(lambda _, __, out: seen.append(out)), torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    x = (seen[0][0] if isinstance(seen[0], tuple) else seen[0])[torch.arange(len(ids)), mask.sum(1) - 1]
    return x @ features.weight[:, features.latents]


@table(strength=2, family=FAMILIES, constraint=("weight", "activation", "coupled"), tuning=("full", "lora"))
def test_what_a_constraint_holds_in_a_family_is_held(family, constraint, tuning):
    scope = SCOPE.get(family, "all_linear")
    way = FULL if tuning == "full" else replace(LORA, modules=scope)
    held = parts(scope, constraint)
    settings = {"architecture": family, "tuning": way, "rows": ROWS[:12], "epochs": 3, "learning_rate": 3e-3}
    model, prepared = train(Composite(held), **settings)
    before, after = weights(start(family, way)), weights(model)
    matrices = {matrix.name: matrix.site.name for matrix in linears(model, scope)}
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert matrices.keys() <= moved
    if "weight" in held:
        for name, site in matrices.items():
            update, basis = (after[name] - before[name]).double(), prepared.subspace.bases[site].double()
            assert 0 < basis.shape[1] < len(basis)
            assert (update @ basis).norm() < 1e-4 * update.norm(), name
    if "activation" in held:
        free, _ = train(Composite(), **settings)
        was = held_latents(start(family, way), prepared)
        drift, free_drift = ((held_latents(each, prepared) - was).norm() for each in (model, free))
        assert drift < 0.3 * free_drift  # 0.02 to 0.16 were seen


@pytest.mark.parametrize("family", tiny.ARCHITECTURES)
def test_every_linear_layer_of_a_family_is_constrained(family):
    model = tiny.model(family)
    layers = {f"{name}.weight" for name, each in model.named_modules() if isinstance(each, torch.nn.Linear)}
    assert {matrix.name for matrix in linears(model, "all_linear")} == layers - {"lm_head.weight"}


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
