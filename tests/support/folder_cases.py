"""What folders come to: the line that says what is wrong, or that they are used as their files say."""

import shutil

import torch

from support import tiny
from support.folders import (
    COUPLED,
    INDEX,
    LORA,
    WEIGHTS,
    adapter,
    beside,
    broken_adapter,
    configured,
    dangling,
    edit,
    gpt2_of_the_hub,
    in_few,
    inner,
    instead,
    more_tokens,
    no_tokenizer,
    notes,
    of,
    only,
    own_code,
    prefixed,
    reworked,
    saved,
    shards,
    truncated,
    vision,
    with_both_tied,
    with_consolidated,
    with_old_buffers,
    without,
    without_template,
    written,
)

RANK = ("constraint=weight", "constraint.weight.energy=null", "constraint.weight.rank=99999")
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
FAMILIES = ("accepted:", "Llama, Mistral, Qwen2, Qwen3, Gemma")
# Name: what is in the folder, settings of the run, what the line says.
REFUSED = {
    # What is no model folder.
    "nowhere": (lambda folder: None, (), ["model.path=", "a folder with config.json"]),
    "no-model": (notes, (), ["model.path=", "accepted: a folder with config.json, tokenizer and safetensors"]),
    "adapter-of-another-kind": (
        lambda folder: adapter(folder, "IA3"),
        (),
        ["peft_type=IA3; accepted: LoRA", "some/base-7b", "merge_and_unload", "save_pretrained"],
    ),
    "only-prompt-adapter": (lambda folder: adapter(folder, "PROMPT_TUNING"), (), ["PROMPT_TUNING cannot be merged"]),
    "adapter-config-broken": (broken_adapter, (), ["adapter_config.json is no JSON"]),
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
    "adapter-beside-model": (
        beside,
        (),
        ["adapter_config.json lies beside", "accepted: a folder without it", "model.adapter=FOLDER"],
    ),
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
    "other-list-of-layers": (
        only("mpt", n_layers=2, d_model=32, n_heads=4),
        (),
        ["MptForCausalLM (mpt)", "no list of decoder layers", *FAMILIES],
    ),
    "other-list-of-layers-start": (
        only("mpt", n_layers=2, d_model=32, n_heads=4),
        ("finetune=false",),
        ["MptForCausalLM (mpt)"],
    ),
    "gpt2-without-template": (
        of("gpt2", tokenizer=without_template()),
        (),
        ["has no chat template: set model.chat_template"],
    ),
    "gpt2-positions": (
        of("gpt2", max_position_embeddings=512),
        (),
        ["trainer.max_length=512: accepted: at most 508", "GPT2LMHeadModel (gpt2)"],
    ),
    "gpt2-lora-part": (
        of("gpt2"),
        (*LORA, "tuning.modules=query_value"),
        ["tuning.modules=query_value: accepted: ffn_out | ffn | attention | all_linear |", "attn.c_attn"],
    ),
    "gpt2-nf4": (
        of("gpt2"),
        ("constraint=none", "tuning=qlora"),
        ["tuning.base=nf4: accepted: float32 | bfloat16 with GPT2LMHeadModel (gpt2)"],
    ),
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
    "scaled-logits": (of("cohere", logit_scale=0.25), (), ["CohereForCausalLM (cohere)", "scaled", *FAMILIES]),
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
    "joined-lora-part": (
        of("phi3"),
        (*LORA, "tuning.modules=query_value"),
        ["tuning.modules=query_value: accepted: ffn_out | ffn | attention | all_linear |", "self_attn.qkv_proj"],
    ),
    "other-names-lora": (of("gpt_neox"), LORA, ["GPTNeoXForCausalLM (gpt_neox)", "attention.query_key_value"]),
    "other-names-attack": (
        of("gpt_neox"),
        ("attack=outlier_benign",),
        ["attack=outlier_benign: accepted: attack=benign |", "GPTNeoXForCausalLM"],
    ),
    "experts-beside-a-shared-one": (
        of("qwen2_moe"),
        ("constraint=weight",),
        ["constraint.weight.modules=all_linear: accepted: attention |", "mlp.experts", "mlp.shared_expert"],
    ),
    "experts-beside-a-shared-one-lora": (
        of("qwen2_moe"),
        LORA,
        ["tuning.modules=all_linear: accepted: query_value | attention |", "mlp.shared_expert", "no factors"],
    ),
    "experts-in-some-layers-lora": (
        of("qwen3_moe", mlp_only_layers=[0]),
        LORA,
        ["tuning.modules=all_linear: accepted: query_value | attention |", "layers with mlp.experts and others"],
    ),
    "experts-asft": (
        of("mixtral"),
        ("constraint=asft", "constraint.asft.modules=ffn", "model.align=refusals"),
        ["constraint.asft.modules=ffn: accepted: attention | constraint=none |", "MixtralForCausalLM (mixtral)"],
    ),
    "experts-bf16": (
        of("qwen3_moe"),
        (*LORA, "tuning.base=bfloat16"),
        ["tuning.base=bfloat16: accepted: float32", "Qwen3MoeForCausalLM (qwen3_moe)", "mlp.experts"],
    ),
    "experts-nf4": (of("qwen3_moe"), ("constraint=none", "tuning=qlora"), ["tuning.base=nf4: accepted: float32"]),
    "experts-drift": (
        of("olmoe"),
        ("diagnostics.enabled=true",),
        ["diagnostics.enabled=true: accepted: false |", "OlmoeForCausalLM (olmoe)"],
    ),
    "rank-of-all": (of("llama"), RANK, ["constraint.weight.rank=99999: accepted: below ", "the widest input"]),
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


LOADED = {
    "plain": (saved, ("constraint=weight",)),
    **{architecture: (of(architecture), COUPLED) for architecture in tiny.ARCHITECTURES[1:]},
    "bf16-shards": (in_few(torch.bfloat16), ("constraint=weight",)),
    "fp16-shards": (in_few(torch.float16), COUPLED),
    "fp16-lora": (in_few(torch.float16), (*LORA, "tuning.base=bfloat16")),
    "head-apart": (of("llama", tie_word_embeddings=False), ()),
    "head-tied-and-saved": (reworked(with_both_tied), ()),
    "buffers-of-old": (reworked(with_old_buffers), ()),
    "quantization-null": (written("generation_config.json", b'{"eos_token_id": 2}'), ()),
    "consolidated-beside": (with_consolidated, ("constraint=weight",)),
    "inner-model": (inner, ()),
    "inner-model-weight": (inner, ("constraint=weight",)),
    "gpt2-of-the-hub": (gpt2_of_the_hub, COUPLED),
    "gpt2-drift": (of("gpt2"), ("diagnostics.enabled=true", "attack=outlier_benign")),
    "gpt2-lora": (of("gpt2"), (*LORA, "tuning.base=bfloat16")),
    "code-of-its-own-not-needed": (own_code, ()),
    "tokenizer-code-not-needed": (lambda folder: own_code(folder, "tokenizer_config.json"), ()),
    "special-token-never-used": (more_tokens(special=True), ()),
    "joined-l2": (of("phi3"), ("constraint=l2",)),
    "joined-lora": (of("phi3"), (*LORA, "constraint=weight")),
    "other-names": (of("gpt_neox"), ("constraint=kl",)),
    "experts": (of("mixtral"), ()),
    "experts-coupled": (of("qwen3_moe"), COUPLED),
    "experts-in-some-layers": (of("qwen3_moe", mlp_only_layers=[0]), ("constraint=weight",)),
    "experts-lora": (of("qwen3_moe"), LORA),
    "experts-l2": (of("mixtral"), ("constraint=l2", "tuning=lora")),
    "experts-attention": (of("qwen3_moe"), ("constraint=weight", "constraint.weight.modules=attention")),
    "experts-attention-lora": (of("mixtral"), (*LORA, "tuning.modules=attention", "tuning.base=bfloat16")),
    "vision-tower": (vision, ()),
    "logits-not-scaled": (of("granite", logits_scaling=1.0), ()),
}
