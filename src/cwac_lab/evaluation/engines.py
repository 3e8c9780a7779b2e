"""Who generates the answers of an evaluation: transformers, or vLLM where it is installed.

Both are greedy and answer the same token ids, so they differ by ties in floating point only.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch

from cwac_lab.core.errors import ConfigError
from cwac_lab.evaluation.generate import Answer, answers, end_ids, read_answer
from cwac_lab.models.chat import ChatFormat, Prompt


class Engine(Protocol):
    """Answers prompts."""

    def __call__(self, prompts: Sequence[Prompt], max_new_tokens: int, opening: str = "") -> list[Answer]:
        """Return the answer to each prompt, in order: what it is made to begin with, and at most so many new tokens."""
        ...


def hugging_face(model: Any, chat: ChatFormat, batch_size: int) -> Engine:
    """Return ``generate.answers`` on the model as it is, wherever it is."""
    return partial(answers, model, chat, batch_size=batch_size)


def vllm(model: Any, chat: ChatFormat, batch_size: int) -> Engine:
    """Return vLLM's offline inference on a copy of the model, which itself goes to the CPU to make room.

    The copy passes through safetensors in a temporary folder. Prompts are handed over as token ids, so that no second
    tokenizer has a say; ``batch_size`` does not matter, as vLLM batches by itself.

    Args:
        model: A causal language model, with adapters merged.
        chat: Its chat format.
        batch_size: Not used.
    """
    from vllm import LLM, SamplingParams

    model.to("cpu")
    gc.collect()
    torch.cuda.empty_cache()
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        engine = LLM(
            model=folder,
            skip_tokenizer_init=True,
            trust_remote_code=False,
            dtype=str(model.dtype).removeprefix("torch."),
            generation_config="vllm",
            seed=0,
        )

    def answer(prompts: Sequence[Prompt], max_new_tokens: int, opening: str = "") -> list[Answer]:
        # The same ends as with transformers, whatever else the model's folder calls an end.
        ends = end_ids(model, chat)
        greedy = SamplingParams(
            temperature=0.0, max_tokens=max_new_tokens, stop_token_ids=ends, ignore_eos=True, detokenize=False
        )
        forced = chat.tokens(opening)
        asked = [{"prompt_token_ids": [*chat.prompt_ids(prompt), *forced]} for prompt in prompts]
        given = [list(output.outputs[0].token_ids) for output in engine.generate(asked, greedy, use_tqdm=False)]
        return [read_answer(model, chat, forced, ids) for ids in given]

    return answer


ENGINES: dict[str, Callable[[Any, ChatFormat, int], Engine]] = {"hf": hugging_face, "vllm": vllm}


def check(name: str, devices: int) -> None:
    """Check that an engine can run here.

    Raises:
        ConfigError: If it is not installed, or there are several devices, which only transformers is divided among.
    """
    if name != "vllm":
        return
    if find_spec("vllm") is None:
        raise ConfigError("evaluation.engine", name, "hf, or vllm where it is installed (pip install vllm)")
    if devices > 1:
        raise ConfigError("evaluation.engine", name, f"hf with trainer.devices={devices}")
