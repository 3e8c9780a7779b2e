"""Folders that a user may point to, made for tests: models of many kinds, whole, broken or of another shape."""

import copy
import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

import cwac_lab
from cwac_lab.config import run as config
from cwac_lab.models import loading
from support import tiny

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
COUPLED = ("constraint=coupled", "constraint.activation.n_latents=16")
LORA = ("constraint=none", "tuning=lora")


def saved(folder, architecture="llama", tokenizer=None, **changes):
    """A small model of an architecture with its tokenizer."""
    tiny.model(architecture, **tiny.MIXTURES.get(architecture, {}), **changes).save_pretrained(folder)
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


def broken_adapter(folder):
    """Write an adapter whose settings are no JSON."""
    adapter(folder)
    (folder / "adapter_config.json").write_text("{")


def notes(folder):
    """Write a folder that holds a text and no model."""
    folder.mkdir()
    (folder / "notes.txt").write_text("none")


def no_tokenizer(*left):
    def make(folder):
        saved(folder)
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            if file not in left:
                (folder / file).unlink()

    return make


def without_template():
    """A tokenizer as GPT-2 has it: none for conversations."""
    plain = copy.deepcopy(tiny.tokenizer())
    plain.chat_template = None
    return plain


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


def inner(folder, architecture="llama", **more):
    """What the decoder alone saves: names without the model's prefix; the head is tied."""
    saved(folder, architecture)
    tiny.model(architecture).get_decoder().save_pretrained(folder)
    save_file({**load_file(folder / WEIGHTS), **more}, folder / WEIGHTS, metadata={"format": "pt"})


def gpt2_of_the_hub(folder):
    """As GPT-2 was published: the inner model, and a mask in every layer."""
    inner(folder, "gpt2", **{f"h.{layer}.attn.bias": torch.ones(1, 1, 8, 8) for layer in range(2)})


def in_few(dtype):
    """A folder of numbers of few bits, in several files."""

    def make(folder):
        tiny.model().to(dtype).save_pretrained(folder, max_shard_size="20KB")
        tiny.tokenizer().save_pretrained(folder)

    return make


def with_consolidated(folder):
    save_file({"layers.0.attention.wq.weight": torch.zeros(2, 2)}, saved(folder) / "consolidated.safetensors")


def with_both_tied(tensors):
    return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}


def with_old_buffers(tensors):
    return {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}


# Name: what is in the folder, settings of the run.


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
