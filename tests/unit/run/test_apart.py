"""How far two models are apart, beside plain formulas."""

from __future__ import annotations

import weakref

import pytest
import torch
from safetensors.torch import save_file

from cwac_lab.config.run import read
from cwac_lab.core.stats import mean_per
from cwac_lab.run.apart import apart, next_log_probs, weight_distances
from cwac_lab.run.start import Start
from support import tiny

ASKED = {"harmful": ["how", "how do I do that?", "tell me"], "harmless": ["bake bread", "plan a trip"]}
ROWS = [{"kind": kind, "id": text, "prompt": text} for kind, texts in ASKED.items() for text in texts]


def by_hand(model, text):
    """The log-probabilities after one prompt, alone in its batch."""
    with torch.no_grad():
        return model(torch.tensor([tiny.chat().prompt_ids(text)])).logits[0, -1].log_softmax(-1)


@pytest.mark.parametrize("architecture", ["llama", "granite", "gemma2"])
def test_what_a_model_would_say_next_is_that_of_a_plain_forward(architecture):
    model, texts = tiny.lively(architecture), ASKED["harmful"]
    found = next_log_probs(model, tiny.chat(), [tiny.chat().prompt_ids(text) for text in texts], 2)
    expected = torch.stack([by_hand(model, text) for text in texts])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def asking(folder, output):
    return read(tiny.config(*tiny.small_run(folder, output), "finetune=false"))


def test_drift_is_the_mean_divergence_with_its_interval_and_one_model_is_held_at_a_time(
    tiny_folder, tmp_path, monkeypatch
):
    other = tiny.save(tmp_path / "other", seed=1)
    alive, load = [], Start.load

    def watched(self, run):
        assert [ref() for ref in alive] in ([], [None])
        model, chat = load(self, run)
        alive.append(weakref.ref(model))
        return model, chat

    monkeypatch.setattr(Start, "load", watched)
    found = apart([asking(folder, tmp_path / "out") for folder in (tiny_folder, other)], ROWS)
    assert len(alive) == 2
    told = {row[0]: row[1:] for row in found.rows}
    for kind, texts in ASKED.items():
        pairs = [[by_hand(tiny.model(seed=seed), text) for seed in (0, 1)] for text in texts]
        mean = mean_per([float((p.exp() * (p - q)).sum()) for p, q in pairs], [1] * len(pairs))
        value, n = told[f"KL(before || after) of the next token, {kind} prompts, nats"]
        low, high = (float(part) for part in value.partition(" [")[2].strip("]").split(", "))
        assert float(value.partition(" ")[0]) == pytest.approx(mean.value, rel=0.01)
        assert (low, high) == (pytest.approx(max(mean.low, 0), rel=0.02), pytest.approx(mean.high, rel=0.02))
        assert n == str(len(texts))
    assert [name.partition(":")[0] for name in told][2:] == [
        "weights, norms", "weights, embeddings", "weights, attention", "weights, feed-forward layers",
    ]  # fmt: skip
    assert found.remarks == []
    again = apart([asking(folder, tmp_path / "out") for folder in (tiny_folder, other)], ROWS)
    assert again == found
    assert len(alive) == 2  # no model was loaded for it


def test_a_model_and_itself_are_not_apart(tiny_folder, tmp_path):
    run = asking(tiny_folder, tmp_path / "out")
    found = apart([run, run], ROWS)
    assert {row[1].partition(" ")[0] for row in found.rows} == {"0"}
    assert found.remarks == [f"before and after are one folder, {tiny_folder}"]


def test_models_of_other_shapes_or_words_are_told_in_one_line(tiny_folder, tmp_path):
    other = tiny.save(tmp_path / "other", "qwen2")
    found = apart([asking(folder, tmp_path / "out") for folder in (tiny_folder, other)], ROWS)
    assert found.rows == []
    (line,) = found.remarks
    assert line.startswith("drift is not told: it needs a model of the shape of ")
    assert "model_type=llama, not qwen2" in line


def test_weights_of_an_inner_model_are_compared_and_masks_are_no_weights(tmp_path):
    start = {"h.0.mlp.c_fc.weight": torch.ones(2, 2), "h.0.attn.bias": torch.ones(1, 1, 4, 4)}
    moved = {"transformer.h.0.mlp.c_fc.weight": torch.full((2, 2), 1.5)}
    for name, tensors in (("before", start), ("after", moved)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    for names in (("before", "after"), ("after", "before")):
        found, left_out = weight_distances(*(tmp_path / name for name in names))
        (distance,) = found.values()
        assert distance == (pytest.approx(0.5 if names[0] == "before" else 1 / 3), 1)
        assert left_out == 0


def test_weights_are_compared_by_kind_where_their_shapes_agree(tmp_path):
    start = {
        "model.embed_tokens.weight": torch.ones(4, 2),
        "model.layers.0.self_attn.q_proj.weight": torch.tensor([[3.0, 4.0]]),
        "model.layers.0.self_attn.q_norm.weight": torch.ones(2),
        "model.layers.0.mlp.up_proj.weight": torch.full((2, 2), 2.0),
        "model.layers.1.mlp.up_proj.weight": torch.zeros(2, 2),
        "scale": torch.tensor(2.0),
    }
    moved = {
        **start,
        "model.embed_tokens.weight": torch.ones(5, 2),  # of another vocabulary
        "model.layers.0.self_attn.q_proj.weight": torch.tensor([[3.0, 3.0]]),
        "model.layers.1.mlp.up_proj.weight": torch.ones(2, 2),
        "scale": torch.tensor(3.0).bfloat16(),
        "lm_head.weight": torch.ones(5, 2),
    }
    for name, tensors in (("before", start), ("after", moved)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    found, left_out = weight_distances(tmp_path / "before", tmp_path / "after")
    assert found == {
        "norms": (0.0, 1),
        "attention": (pytest.approx(0.2), 1),
        "feed-forward layers": (pytest.approx(0.5), 2),  # 2 of 4
        "other tensors": (pytest.approx(0.5), 1),
    }
    assert left_out == 2
