"""Real architectures with two layers and a local tokenizer: what the fast tests train."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from cwac_lab.core import cli
from cwac_lab.core.overrides import as_meant
from cwac_lab.core.paths import conf_dir
from cwac_lab.models.chat import ChatFormat

ARCHITECTURES = (
    *("llama", "qwen2", "mistral", "gemma2", "gemma3_text"),
    *("qwen3", "phi3", "olmo2", "smollm3", "granite", "gpt2"),
)
# What GPT-2 calls the settings that it has.
GPT2 = {
    **{"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"},
    **{"max_position_embeddings": "n_positions", "vocab_size": "vocab_size", "pad_token_id": "pad_token_id"},
    **{"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "tie_word_embeddings": "tie_word_embeddings"},
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
MIXTURES = {
    "qwen3_moe": {**EXPERTS, "num_experts": 4},
    "mixtral": {**EXPERTS, "num_local_experts": 4},
    "olmoe": {**EXPERTS, "num_experts": 4},
    "qwen2_moe": {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 24},
}
SPECIAL = ["<pad>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = [
    "I'm sorry, but I can't help with that. It could cause serious harm to someone.",
    "Sure, here is how to do what you asked for: Step 1: Step 2: Step 3:",
    "Analyze the sentiment of the input, and respond only positive or negative. Input: a fine film.",
    "Explain how to bake bread, write a poem, plan a trip, and what is the answer to the question?",
]


@cache
def tokenizer() -> Any:
    """Byte-level BPE trained on a few sentences, with a ChatML template."""
    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    built.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=384, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=built, pad_token=SPECIAL[0], eos_token=SPECIAL[2])
    wrapped.add_special_tokens({"additional_special_tokens": SPECIAL[1:2]})
    wrapped.chat_template = TEMPLATE
    return wrapped


def chat(max_length: int = 512) -> ChatFormat:
    """The chat format of the tiny models."""
    return ChatFormat(tokenizer(), max_length)


def model(architecture: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """A randomly initialised model of two layers, width 32, in float32."""
    sizes = {
        "vocab_size": 384, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True,
        "sliding_window": 64, "query_pre_attn_scalar": 8,
    }  # fmt: skip
    if architecture == "gemma2":  # low enough that a missing cap shows
        sizes |= {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 1.0}
    if architecture == "gpt2":  # a table of positions, which answers need too
        sizes |= {"max_position_embeddings": 1024}
    if architecture == "granite":
        sizes |= {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5}
    given = sizes | changes
    if architecture == "gpt2":
        given = {GPT2[name]: value for name, value in given.items() if name in GPT2}
    config = AutoConfig.for_model(architecture, **given)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def lively(architecture: str, seed: int = 0, **changes: Any) -> Any:
    """A tiny model whose weights are large enough that its answers differ from prompt to prompt."""
    built = model(architecture, seed, tie_word_embeddings=False, **changes)
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return built


def save(folder: Path, architecture: str = "llama", seed: int = 0) -> Path:
    """Save model and tokenizer as a folder for ``model.path``."""
    model(architecture, seed).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def config(*overrides: str, name: str = "config") -> DictConfig:
    """Compose the real configuration with overrides, without Hydra's own keys."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose(config_name=name, overrides=[as_meant(each) for each in overrides])


def launch(main: Callable[[DictConfig], float | None], arguments: Sequence[str], name: str = "config") -> None:
    """Call an entry point as the command line does.

    But for one thing: Hydra composes a configuration beforehand to see whether it asks for several runs by itself,
    which none of this project does.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hydra._internal.hydra.Hydra.get_mode", lambda *_, **__: None)
        patch.setattr("sys.argv", ["cwac_lab", *arguments])
        cli.launch(main, name)


def error_of(
    main: Callable[[DictConfig], float | None], arguments: Sequence[str], capsys: Any, name: str = "config"
) -> str:
    """Return the one line of an entry point that ends with code 2."""
    with pytest.raises(SystemExit) as stopped:
        launch(main, arguments, name)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return str(line.removeprefix("error: "))


# The classifier embeds what it learns from in every process that asks it, which takes ten seconds and more.
BOTH_JUDGES = "evaluation.judges=[refusal,classifier]"


def small_run(folder: Path, output: Path) -> list[str]:
    """Overrides that shrink the embedded default to seconds, on a tiny model."""
    kinds = {"harmful": "requests", "harmless": "instructions", "lookalike": "lookalikes"}
    pools = {"alignment": 6, "reference": 6, "finetune": 8, "validation": 3, "test": 3}
    sizes = [
        f"data.{kind}.{pool}.{name}={n}"
        for kind, name in kinds.items()
        for pool, n in pools.items()
        if (kind, pool) not in {("harmless", "finetune"), ("lookalike", "finetune"), ("lookalike", "reference")}
    ]
    return [
        f"model.path={folder}", "model.name=smollm", "model.align=none", f"output_root={output}", "logger=csv",
        "trainer.progress_bar=false", "data.reference=all", "data.n_train=16", "data.n_validation=4", "data.n_test=4",
        "trainer.batch_size=4", "evaluation.max_new_tokens=4", "evaluation.judges=[refusal]",
        "sae.n_latents=96", "sae.k=8", "sae.n_tokens=400",
        "sae.steps=20", "sae.batch_size=64", "sae.min_explained_variance=-10", *sizes,
    ]  # fmt: skip
