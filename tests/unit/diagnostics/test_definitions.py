"""Measurements of drift against their definitions, on tiny models."""

import copy
import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.functional import kl_div

from cwac_lab.defenses.cwac.sae.latents import LayerFeatures
from cwac_lab.defenses.cwac.subspace.span import Span
from cwac_lab.defenses.cwac.subspace.spec import Subspace
from cwac_lab.diagnostics import seen
from cwac_lab.diagnostics.evidence import correlations
from cwac_lab.diagnostics.linear import EXACT, bound, decompose, leading, overlap
from cwac_lab.diagnostics.probe import Probe, first_tokens
from cwac_lab.diagnostics.seen import Reader
from cwac_lab.diagnostics.stream import latent_drift, refusal_directions
from cwac_lab.models import adapters
from cwac_lab.models.adapters import TuningConfig
from cwac_lab.models.sites import decoder_layers
from support import tiny

HARMFUL = ["how to bake bread", "a plan for the trip", "write a poem about harm to someone"]
BENIGN = ["a fine film", "what is the answer?", "explain a question, plan a trip and write a poem"]


def asked():
    chat = tiny.chat()
    prompts = {"harmful": HARMFUL, "benign": BENIGN}
    rows = {
        kind: [chat.encode(text, "I'm sorry, but I can't help with that") for text in texts]
        for kind, texts in prompts.items()
    }
    return chat, rows


def moved(start, scale=0.3):
    model = copy.deepcopy(start)
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * parameter.std() * torch.randn(parameter.shape, generator=source))
    return model


def reader(model):
    held = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return held.__getitem__


def features(width=32, latents=96):
    source = torch.Generator().manual_seed(2)
    weight, bias = torch.randn(width, latents, generator=source), torch.randn(latents, generator=source)
    return LayerFeatures(1, weight, bias, 8, torch.tensor([3, 40, 41, 77]), torch.ones(4))


def probe(model, **more):
    chat, rows = asked()
    return Probe(model, rows, chat.pad_id, reader(model), **more)


def test_the_parts_of_a_change_are_their_definition():
    source = torch.Generator().manual_seed(0)
    h0, h = torch.randn(7, 5, generator=source), torch.randn(7, 5, generator=source)
    w0, w = torch.randn(3, 5, generator=source), torch.randn(3, 5, generator=source)
    found = decompose(h0, h, w0, w - w0)
    scale = sum(float((w0 @ row).square().sum()) for row in h0) ** 0.5
    expected = {"weight": [], "activation": [], "cross": [], "total": []}
    for before, now in zip(h0, h, strict=True):
        expected["weight"].append((w - w0) @ before)
        expected["activation"].append(w0 @ (now - before))
        expected["cross"].append((w - w0) @ (now - before))
        expected["total"].append(w @ now - w0 @ before)
    for name, rows in expected.items():
        assert found[name] == pytest.approx(float(torch.stack(rows).norm()) / scale, rel=1e-5)
    assert found["gap"] < 1e-6


def test_the_bound_holds_and_is_reached():
    source = torch.Generator().manual_seed(0)
    for turn in range(50):
        h0, h = torch.randn(7, 5, generator=source), torch.randn(7, 5, generator=source)
        w0, dw = torch.randn(3, 5, generator=source), torch.randn(3, 5, generator=source)
        basis = torch.linalg.qr(torch.randn(5, 2 + 2 * (turn % 2), generator=source)).Q
        by_v, by_u = (bound(h0, h, w0, dw, Span.of(basis, ordered=ordered)) for ordered in (True, False))
        assert by_v == pytest.approx(by_u, rel=1e-5)
        assert decompose(h0, h, w0, dw)["total"] <= bound(h0, h, w0, dw, Span.of(basis)) + 1e-6
    held = dw - dw @ basis @ basis.T
    inside = torch.randn(7, basis.shape[1], generator=source) @ basis.T
    assert bound(inside, inside, w0, held, Span.of(basis)) < 1e-5  # exact, inputs within V, none moved
    one = torch.tensor([[1.0, 0, 0, 0, 0]])
    w0, dw = torch.zeros(3, 5), torch.zeros(3, 5)
    w0[0, 0], dw[0, 0] = 2.0, 1.0
    basis = torch.eye(5)[:, 4:]
    assert bound(one, 2 * one, w0, dw, Span.of(basis)) == pytest.approx(decompose(one, 2 * one, w0, dw)["total"])


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_layer_by_layer_the_parts_make_up_the_true_change(architecture):
    start = tiny.lively(architecture)
    found = probe(start).measure(moved(start))
    for kind in ("harmful", "benign"):
        assert [layer["layer"] for layer in found["layers"][kind]] == [0, 1]
        for layer in found["layers"][kind]:
            assert layer["gap"] < 1e-5
            assert min(layer["weight"], layer["activation"], layer["cross"]) > 0.01
            assert layer["total"] <= layer["weight"] + layer["activation"] + layer["cross"] + 1e-6


def test_a_start_that_has_not_moved_shows_no_drift():
    start = tiny.lively("llama")
    found = probe(start, features=[features()]).measure(start)
    for kind in ("harmful", "benign"):
        means = found["summary"][kind]
        assert {means[name] for name in ("weight", "cross", "latents_chosen", "latents_code")} == {0.0}
        assert abs(means["kl"]) < 1e-6
        assert means["overlap"] == pytest.approx(1)
        assert means["refusal_cosine"] == pytest.approx(1)


def test_only_what_was_changed_is_blamed():
    start = tiny.lively("llama")
    first, last = (layer.mlp.down_proj for layer in decoder_layers(start))
    for changed, parts in ((last, {"weight"}), (first, {"activation"})):
        model = copy.deepcopy(start)
        index = [first, last].index(changed)
        with torch.no_grad():
            decoder_layers(model)[index].mlp.down_proj.weight.mul_(1.5)
        of_last = probe(start).measure(model)["layers"]["harmful"][1]
        assert {name for name in ("weight", "activation", "cross") if of_last[name] > 1e-6} == parts


def long_asked():
    """Return rows that share an opening worth a forward of its own."""
    chat = tiny.chat()
    texts = [
        f"please plan a trip and then write a poem about {what}" for what in ("bread", "a fine film", "the answer")
    ]
    return chat, [chat.encode(text, "I'm sorry, but I can't help with that") for text in texts]


def test_sinks_padding_and_answers_do_not_count():
    start = tiny.lively("llama")
    chat, rows = long_asked()
    alone = Reader(rows, chat.pad_id, hooked=[1], batch_size=1).read(start)
    prompts = [sum(label < 0 for label in row.labels) for row in rows]
    assert len(alone.tokens[1]) == sum(prompts) - len(rows)
    assert all(len(x) == sum(prompts) - len(rows) for x in alone.inputs.values())


def test_a_shared_opening_is_computed_once_and_counts_for_every_row(monkeypatch):
    start = tiny.lively("llama")
    chat, rows = long_asked()
    monkeypatch.setattr(seen, "without_sinks", lambda x, mask: mask.bool())
    together = Reader(rows, chat.pad_id, hooked=[1]).read(start)
    alone = Reader(rows, chat.pad_id, hooked=[1], batch_size=1).read(start)
    for site, x in together.inputs.items():
        assert len(x) < len(alone.inputs[site])
        torch.testing.assert_close(x.T @ x, alone.inputs[site].T @ alone.inputs[site], atol=1e-4, rtol=1e-4)
    for name in ("last", "log_probs"):
        torch.testing.assert_close(getattr(together, name), getattr(alone, name), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(together.tokens[1], alone.tokens[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("place", [2, -3])  # in the shared opening, and after it
def test_the_start_decides_which_tokens_are_sinks(place):
    start = tiny.lively("llama")
    chat, rows = long_asked()
    reader = Reader(rows, chat.pad_id, hooked=[1])
    spared = {site: len(x) for site, x in Reader(rows, chat.pad_id).read(start).inputs.items()}
    prompt = [label < 0 for label in rows[0].labels]
    token = rows[0].input_ids[: sum(prompt)][place]
    seen_before = start.get_input_embeddings().weight[token].clone()
    embedding = start.get_input_embeddings().weight
    with torch.no_grad():
        embedding[token] *= 1e4  # a residual stream far above the median's; FFN inputs are normalised before
    first = reader.read(start).tokens[1]
    with torch.no_grad():
        embedding[token] = seen_before
    assert len(reader.read(start).tokens[1]) == len(first) < sum(sum(lab < 0 for lab in row.labels) - 1 for row in rows)
    assert spared == {site: len(x) for site, x in Reader(rows, chat.pad_id).read(start).inputs.items()}


def test_all_is_read_in_one_forward():
    """What a plain forward of every row on its own has, by transformers and hooks of its own."""
    start = tiny.lively("llama")
    chat, rows = long_asked()
    found = Reader(rows, chat.pad_id, hooked=[0], batch_size=1).read(start)
    inputs, calls = [], []
    layers = decoder_layers(start)
    layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0]))
    start.get_decoder().register_forward_hook(lambda *_: calls.append(1))
    rows = sorted(rows, key=lambda row: len(row.input_ids))
    for number, row in enumerate(rows):
        with torch.no_grad():
            states = start(torch.tensor([row.input_ids]), output_hidden_states=True)
        n = sum(label < 0 for label in row.labels)
        torch.testing.assert_close(found.last[number, 0], states.hidden_states[1][0, n - 1], atol=1e-5, rtol=1e-5)
    read = torch.cat([x[1 : sum(label < 0 for label in row.labels)] for x, row in zip(inputs, rows, strict=True)])
    (site,) = (site for site in found.inputs if site.layer == 1)
    assert len(read) == len(found.inputs[site])
    torch.testing.assert_close(found.inputs[site].T @ found.inputs[site], read.T @ read, atol=1e-4, rtol=1e-4)
    calls.clear()
    probe(start).measure(start)
    assert len(calls) == 2 * 2  # the start and now, two kinds


def test_leak_is_that_of_the_update():
    start = tiny.lively("llama")
    after = moved(start)
    basis = torch.linalg.qr(torch.randn(48, 5, generator=torch.Generator().manual_seed(3))).Q
    space = Subspace({f"layers.{i}.ffn_out": Span.of(basis) for i in range(2)}, {})
    layer = probe(start, subspace=space).measure(after)["layers"]["harmful"][0]
    dw = after.get_parameter(layer["name"]) - start.get_parameter(layer["name"])
    assert layer["leak"] == pytest.approx(float((dw.detach() @ basis).norm() / dw.detach().norm()), rel=1e-4)


def test_adapters_count_as_the_update_that_they_are():
    start = tiny.lively("llama")
    measure = probe(start).measure
    model = copy.deepcopy(start)
    merge = adapters.attach(model, TuningConfig("lora", rank=4), 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    before = measure(model)
    merge()
    after = measure(model)
    for kind, means in before["summary"].items():
        assert means["weight"] > 0.01
        assert means == pytest.approx(after["summary"][kind], rel=1e-3, abs=1e-5)


def test_angles_are_those_of_the_leading_directions():
    source = torch.Generator().manual_seed(0)
    h0, h = torch.randn(40, 24, generator=source), torch.randn(40, 24, generator=source)
    before, now = (torch.linalg.svd(x.double()).Vh[:16].T for x in (h0, h))
    expected = float((before.T @ now).square().sum()) / 16
    assert overlap(leading(h0), leading(h)) == pytest.approx(expected, rel=1e-5)
    assert overlap(leading(h0), leading(2 * h0)) == pytest.approx(1)
    many = torch.randn(EXACT + 1, 24, generator=source) * torch.arange(24, 0, -1)
    exact = torch.linalg.svd(many.double(), full_matrices=False).Vh[:16].T.float()
    assert overlap(exact, leading(many)) > 0.99


def test_latents_are_counted_in_their_own_deviations():
    source = torch.Generator().manual_seed(0)
    feature = features()
    x0, x = torch.randn(30, 32, generator=source), torch.randn(30, 32, generator=source)
    found = latent_drift(x0, x, feature)
    z0, z = x0 @ feature.weight + feature.bias, x @ feature.weight + feature.bias
    squares = [float(((z - z0)[:, i] / z0[:, i].std()).square().mean()) for i in range(96)]
    chosen = feature.latents.tolist()
    assert found["chosen"] == pytest.approx(sum(squares[i] for i in chosen) / 4, rel=1e-4)
    assert found["others"] == pytest.approx(sum(squares[i] for i in range(96) if i not in chosen) / 92, rel=1e-4)


def test_the_refusal_direction_is_the_difference_of_means():
    source = torch.Generator().manual_seed(0)
    harmful, benign = torch.randn(5, 2, 8, generator=source), torch.randn(6, 2, 8, generator=source)
    directions, length = refusal_directions(harmful, benign)
    for layer in range(2):
        expected = harmful[:, layer].mean(0) - benign[:, layer].mean(0)
        torch.testing.assert_close(directions[layer] * length[layer], expected)


def test_the_divergence_is_taken_at_the_first_tokens_of_the_starts_answers():
    start = tiny.lively("llama")
    after = moved(start)
    _, rows = asked()
    found = probe(start).measure(after)["kl_first_tokens"]["harmful"]
    values = []
    for row in map(first_tokens, rows["harmful"]):
        assert sum(label >= 0 for label in row.labels) == 5
        ids = torch.tensor([row.input_ids])
        p0, p = (model(ids).logits[0].float().log_softmax(-1) for model in (start, after))
        at = [i - 1 for i, label in enumerate(row.labels) if label >= 0]
        values += kl_div(p[at], p0[at], log_target=True, reduction="none").sum(-1).tolist()
    assert found == pytest.approx(sum(values) / len(values), rel=1e-4)


def test_reconstruction_is_told_before_and_now():
    start = tiny.lively("llama")
    seen = []

    def explains(x):
        seen.append(x)
        return float(x.square().mean())

    model = moved(start)
    found = probe(start, features=[features()], explains={1: explains}).measure(model)["reconstruction"]["1"]["harmful"]
    assert found["start"] == float(seen[0].square().mean())
    assert found["now"] == float(seen[1].square().mean())
    assert not math.isclose(found["start"], found["now"])


def test_what_goes_with_the_harmful_score_is_told_over_sound_runs():
    frame = pd.DataFrame(
        {
            "harmful_score": [0.0, 10, 20, 40, 80, 100, None, 50],
            "broken": [False] * 7 + [True],
            "drift_harmful_kl": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 9, 0],
            "drift_harmful_weight": [6.0, 5, 4, 3, 2, 1, 0, 9],
            "drift_harmful_leak": [1.0, 1, 1, None, None, None, 1, 1],
            "drift_benign_kl": [1.0] * 8,
        }
    )
    found = correlations(frame).set_index("measurement")
    assert set(found.index) == {"kl", "weight"}
    assert (found.loc["kl", "rho"], found.loc["weight", "rho"]) == (1.0, -1.0)
    assert set(found["n"]) == {6}
    noise = np.random.default_rng(0).permutation(6)
    mixed = correlations(frame[:6].assign(drift_harmful_kl=noise)).set_index("measurement").loc["kl"]
    assert mixed["low"] < mixed["rho"] < mixed["high"]
    assert mixed["high"] - mixed["low"] > 0.5
    assert correlations(frame[:4]).empty


def test_measuring_leaves_the_model_as_it_is():
    start = tiny.lively("llama")
    model = moved(start).train()
    held = {name: value.clone() for name, value in model.state_dict().items()}
    probe(start).measure(model)
    assert model.training
    assert all(torch.equal(value, held[name]) for name, value in model.state_dict().items())
