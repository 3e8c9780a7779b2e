"""LoRA adapters as PEFT saves them, of tiny models: plain ones and others."""

import json

import peft
import torch
from safetensors.torch import load_file, save_file

from support import tiny
from support.folders import edit

FACTORS = "adapter_model.safetensors"
LINEAR = ["q_proj", "v_proj", "down_proj"]


def adapter_of(folder, base, model=None, kind=peft.LoraConfig, dtype=torch.float32, **settings):
    """An adapter of a model that PEFT draws and saves, none of its factors zero."""
    given = {"task_type": "CAUSAL_LM", "target_modules": LINEAR, **settings}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tuned = peft.get_peft_model(model or tiny.model(), kind(**given))
        for name, parameter in tuned.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                torch.nn.init.normal_(parameter, std=0.1)
    tuned.to(dtype).save_pretrained(folder)
    edit(folder, "adapter_config.json", base_model_name_or_path=str(base))
    return folder


def refused(told, change=lambda folder: None, **settings):
    """A row of ``REFUSED``: what the line says, a change of the folder afterwards, settings of PEFT."""
    return settings, change, told


def tensors(change):
    """A change of an adapter's factors, in a dictionary by name."""

    def changed(folder):
        save_file(change(load_file(folder / FACTORS)), folder / FACTORS)

    return changed


def pickled(folder):
    torch.save(load_file(folder / FACTORS), folder / "adapter_model.bin")
    (folder / FACTORS).unlink()


def config(**changes):
    """A change of an adapter's settings."""
    return lambda folder: edit(folder, "adapter_config.json", **changes)


def factors_only(held):
    """PEFT saves a head whole beside its factors."""
    return {name: tensor for name, tensor in held.items() if "lora_" in name}


def base_is_an_adapter(folder):
    adapter_of(folder.parent / "first", "some/base")
    config(base_model_name_or_path=str(folder.parent / "first"))(folder)


def wider_words(folder):
    """A tokenizer of the adapter's own, with a token more than the base has embeddings."""
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    from transformers import AutoTokenizer

    wider = AutoTokenizer.from_pretrained(base)
    wider.add_special_tokens({"pad_token": "<extra>"})
    wider.add_tokens([f"<more{n}>" for n in range(400 - len(wider))])
    wider.save_pretrained(folder)


FIRST = "base_model.model.model.layers.0.self_attn.q_proj"
# Name: settings of PEFT, a change of the folder, what the line says.
REFUSED = {
    "dora": refused(["use_dora=True; accepted: LoRA without it", "merge_and_unload"], use_dora=True),
    "ia3": refused(
        ["peft_type=IA3", "accepted: LoRA"], kind=peft.IA3Config, feedforward_modules=["down_proj"]
    ),
    "prompts": refused(
        ["peft_type=PROMPT_TUNING", "cannot be merged"], config(peft_type="PROMPT_TUNING")
    ),
    "biases": refused(["bias=all"], model=tiny.model("qwen2"), bias="all"),
    "biases-of-factors": refused(["lora_bias=True"], model=tiny.model("qwen2"), lora_bias=True),
    "whole-modules": refused(["modules_to_save=['lm_head']"], modules_to_save=["lm_head"]),
    "embeddings": refused(
        ["embed_tokens", "is no factor; accepted: base_model"], target_modules=["embed_tokens", "q_proj"]
    ),
    "tokens": refused(["trainable_token_indices="], trainable_token_indices=[3]),
    "pissa": refused(["init_lora_weights=pissa"], init_lora_weights="pissa"),
    "layers-twice": refused(["layer_replication="], config(layer_replication=[[0, 2], [1, 2]])),
    "no-factors-of-experts": refused(
        ["no factors of mlp.experts.gate_up_proj, which target_parameters names"],
        config(target_parameters=["mlp.experts.gate_up_proj"]),
    ),
    "settings-of-tomorrow": refused(["use_xyz=True"], config(use_xyz=True)),
    "no-rank": refused(["r=None"], config(r=None)),
    "tied-head": refused(["lm_head is tied to the embeddings"], tensors(factors_only), target_modules=["lm_head"]),
    "pickled": refused(["pickled weights are not loaded (adapter_model.bin)", "accepted: adapter_model"], pickled),
    "no-factors": refused(["its factors are not there"], lambda folder: (folder / FACTORS).unlink()),
    "broken": refused(["is no whole safetensors file"], lambda folder: (folder / FACTORS).write_bytes(b"x")),
    "names-of-a-projection": refused(
        ["lora_A.default.parametrizations.weight.original is no factor"],
        tensors(lambda held: {n.replace("A.", "A.default.parametrizations.") + ".original": held[n] for n in held}),
    ),
    "half-a-pair": refused(
        ["lacks model.layers.0.self_attn.q_proj.lora_B"],
        tensors(lambda held: {name: t for name, t in held.items() if name != f"{FIRST}.lora_B.weight"}),
    ),
    "layer-without-factors": refused(
        ["no factors of model.layers.0.self_attn.q_proj, which target_modules names"],
        tensors(lambda held: {name: t for name, t in held.items() if not name.startswith(FIRST)}),
    ),
    "empty": refused(["lacks factors"], tensors(lambda held: {})),
    "rank-of-another": refused(["have rank 8 and 8; accepted: 4"], config(r=4)),
    "narrower": refused(["is of shape", "the model it was made of"], model=tiny.model(hidden_size=16)),
    "deeper": refused(["no layer model.layers.2"], model=tiny.model(num_hidden_layers=3)),
    "of-no-linear-layer": refused(
        ["is a LlamaRMSNorm; accepted: factors of linear layers"],
        tensors(lambda held: {n.replace("self_attn.q_proj", "input_layernorm"): t for n, t in held.items()}),
    ),
    "no-base": refused(["base_model_name_or_path", "model.path=BASE"], config(base_model_name_or_path=None)),
    "base-is-gone": refused(
        ["base_model_name_or_path of model.path=", "=/gone/away: accepted: a folder", "model.path=BASE model.adapter="],
        config(base_model_name_or_path="/gone/away"),
    ),
    "base-of-the-hub": refused(
        ["base_model_name_or_path of model.path=", "=some/base: it is not in the cache", "model.path=BASE"],
        config(base_model_name_or_path="some/base"),
    ),
    "base-is-an-adapter": refused(["no config.json in", "first", "merge it (LORA) into some/base"], base_is_an_adapter),
    "more-words": refused(["tuned: the tokenizer has '<more", "as id 399", "384 embeddings"], wider_words),
}  # fmt: skip
