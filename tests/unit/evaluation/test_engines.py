"""The engines that generate answers; vLLM's interface by a stand-in that answers one prompt at a time."""

import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from cwac_lab.config.run import check_machine, read
from cwac_lab.core.errors import ConfigError
from cwac_lab.evaluation.engines import ENGINES
from support import tiny

PROMPTS = ["a fine film", "how to bake bread and plan a trip", "poem", "what is the answer to the question?"]


@dataclass
class _Sampling:
    """The parameters that vLLM is given, by its names (0.14); an unknown one is an error, as there."""

    temperature: float = 1.0
    max_tokens: int = 16
    stop_token_ids: list[int] = field(default_factory=list)
    ignore_eos: bool = False
    detokenize: bool = True


class _Engine:
    """``vllm.LLM`` with the arguments that are used; it keeps the token that ends an answer."""

    def __init__(self, model, *, skip_tokenizer_init, trust_remote_code, dtype, generation_config, seed):
        assert skip_tokenizer_init
        assert not trust_remote_code
        assert generation_config == "vllm"
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()

    @torch.inference_mode()
    def generate(self, prompts, sampling, use_tqdm):
        assert sampling.temperature == 0
        assert sampling.ignore_eos
        assert not sampling.detokenize
        return [self._one(prompt["prompt_token_ids"], sampling) for prompt in prompts]

    def _one(self, ids, sampling):
        given = []
        while len(given) < sampling.max_tokens and not set(given) & set(sampling.stop_token_ids):
            given.append(int(self.model(input_ids=torch.tensor([ids + given])).logits[0, -1].argmax()))
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=given)])


@pytest.fixture
def installed(monkeypatch):
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = _Engine, _Sampling
    monkeypatch.setitem(sys.modules, "vllm", module)


def test_vllm_is_asked_for_the_answers_that_transformers_gives(installed):
    model, chat = tiny.lively("llama"), tiny.chat()
    ending = model.get_output_embeddings().weight
    with torch.no_grad():
        ending[chat.end_id] *= 3  # so that some answers end before the limit
    given = {name: build(model, chat, 2)(PROMPTS, 12) for name, build in ENGINES.items()}
    assert given["vllm"] == given["hf"]
    assert len({answer.text for answer in given["hf"]}) > 1
    assert {answer.ended for answer in given["hf"]} == {False, True}


def test_an_engine_that_cannot_run_is_one_line():
    run = read(tiny.config("evaluation.engine=vllm"))
    with pytest.raises(ConfigError, match=r"evaluation\.engine=vllm: accepted: hf, or vllm where it is installed"):
        check_machine(run)


def test_vllm_takes_one_device(installed, monkeypatch):
    monkeypatch.setattr("cwac_lab.evaluation.engines.find_spec", lambda name: name)
    run = read(tiny.config("evaluation.engine=vllm", "trainer.devices=2"))
    with pytest.raises(ConfigError, match=r"accepted: hf with trainer\.devices=2"):
        check_machine(run)


def test_an_unknown_engine_is_one_line():
    with pytest.raises(ConfigError, match=r"evaluation\.engine=tgi: accepted: hf \| vllm"):
        read(tiny.config("evaluation.engine=tgi"))
