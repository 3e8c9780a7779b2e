"""A model given by path: a folder or a name of the hub, plain or an adapter, and what the hub may say."""

import json
from dataclasses import replace
from types import SimpleNamespace

import peft
import pytest
import torch
from huggingface_hub import errors
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from cwac_lab import train
from cwac_lab.config.run import read
from cwac_lab.core.cache import read_json
from cwac_lab.core.errors import ConfigError, LabError
from cwac_lab.models import loading, lora
from cwac_lab.models.architecture import Use
from cwac_lab.models.loading import ModelConfig, Weights, find, find_base, load_chat, load_model
from cwac_lab.models.origin import CARD, Origin
from cwac_lab.run import start
from support import tiny
from support.folders import edit, run_on, saved, with_consolidated
from support.hub import hub_with
from support.peft_cases import FACTORS, REFUSED, adapter_of

USE = Use(max_length=64)


@pytest.mark.parametrize(
    ("overrides", "name", "align"),
    [
        ((), "smollm", "refusals"),
        (("model=qwen",), "qwen", "refusals"),
        (("model=qwen", "profile=small"), "qwen", "none"),
        (("model.path=Qwen/Qwen3-0.6B",), "Qwen3-0.6B", "none"),
        (("model=qwen", "model.path=hf://gpt2"), "gpt2", "none"),
        (("model.path='https://huggingface.co/some/model/'",), "model", "none"),
        (("model.path=FOLDER",), "my model", "none"),
        (("model.path=FOLDER/",), "my model", "none"),
        (("model.path=.",), "my model", "none"),
        (("model.path=FOLDER", "model.align=refusals"), "my model", "refusals"),
        (("model.path=FOLDER", "model.name=mine"), "mine", "none"),
        (("model.path=FOLDER", "model.adapter=some/tuned"), "tuned", "none"),
        (("model.adapter=some/tuned",), "tuned", "none"),
    ],
)
def test_a_model_given_by_path_has_its_name_and_is_taken_as_it_came(overrides, name, align, tmp_path, monkeypatch):
    folder = saved(tmp_path / "my model")
    monkeypatch.chdir(folder)
    given = [f"model.path='{folder}{each[17:]}'" if "FOLDER" in each else each for each in overrides]
    run = read(tiny.config(*given, "constraint=none"))
    assert (run.model.name, run.model.align) == (name, align)
    assert (run.resolved["model"]["name"], run.resolved["model"]["align"]) == (name, align)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("model.revision=v1",), r"model.revision=v1: accepted: null without model.path"),
        (("model.path=FOLDER", "model.revision=1234567"), r"model.revision=1234567: accepted: null with a folder"),
        (("model.adapter=FOLDER",), r"model.adapter=.*: accepted: a folder with adapter_config.json and adapter_model"),
        (("model.adapter=/nowhere",), r"model.adapter=/nowhere: accepted: .*; of the hub ORG/NAME"),
        (("model.path=FOLDER", "constraint=safelora"), r"model.base=None: accepted: the model before its alignment"),
        (
            ("model.path=FOLDER", "model.base=/nowhere", "constraint=safelora"),
            r"model.base=/nowhere: accepted: a folder",
        ),
    ],
)
def test_what_does_not_fit_together_is_one_line(overrides, told, tmp_path):
    folder = saved(tmp_path / "mine")
    with pytest.raises(ConfigError, match=told):
        read(tiny.config(*(each.replace("FOLDER", str(folder)) for each in overrides)))


def test_the_model_before_alignment_is_that_of_the_path_and_not_of_the_option(tmp_path):
    before = saved(tmp_path / "before")
    weights = {"small": Weights(hub="some/model", base="some/base")}
    config = ModelConfig(path=str(saved(tmp_path / "mine")), base=str(before), weights=weights)
    assert find_base(config, "small").path == before.resolve()
    with pytest.raises(ConfigError, match=r"base=None"):
        find_base(replace(config, base=None), "small")


def test_of_the_hub_a_model_comes_by_its_name(tmp_path, monkeypatch):
    with_consolidated(tmp_path / "held")
    fetched = hub_with(monkeypatch, tmp_path, **{"some/model": tmp_path / "held"})
    found = find(ModelConfig("mine", path="some/model", revision="v2"), "embedded", tmp_path, USE)
    assert (found.content, found.description) == ("some/model@held-v2", "mine: some/model")
    assert {revision for _, revision, _ in fetched} == {"v2"}
    assert not any("consolidated.safetensors" in files for _, _, files in fetched)  # the same weights once more
    assert load_model(found.path).config.model_type == "llama"


def test_a_folder_comes_before_the_hub(tmp_path, monkeypatch):
    saved(tmp_path / "some" / "model")
    monkeypatch.chdir(tmp_path)
    fetched = hub_with(monkeypatch, tmp_path, **{"some/model": saved(tmp_path / "held")})
    assert find(ModelConfig(path="some/model"), "embedded", tmp_path).path == (tmp_path / "some" / "model").resolve()
    assert find(ModelConfig(path="hf://some/model"), "embedded", tmp_path).content == "some/model@held-main"
    assert fetched


PLAIN = {
    "plain": {},
    "stabilised": {"use_rslora": True, "r": 4, "lora_alpha": 3},
    "patterns": {"r": 2, "rank_pattern": {"down_proj": 5}, "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 7}},
    "patterns-stabilised": {"use_rslora": True, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 2}},
    "some-layers": {"layers_to_transform": [1], "init_lora_weights": "gaussian"},
    "in-bf16": {"dtype": torch.bfloat16},
    "by-a-pattern": {"target_modules": r".*layers\.0.*(q|up)_proj"},
    "all-linear": {"target_modules": "all-linear"},
}


@pytest.mark.parametrize("settings", PLAIN.values(), ids=PLAIN)
def test_an_adapter_is_merged_as_peft_merges_it(settings, tmp_path):
    base = saved(tmp_path / "base")
    (base / CARD).write_text("---\nlicense: mit\n---\n")
    adapter = adapter_of(tmp_path / "tuned", base, **settings)
    found = find(ModelConfig("tuned", path=str(adapter)), "embedded", tmp_path / "cache", USE)
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload()
    start, mine = tiny.model().state_dict(), load_model(found.path).state_dict()
    for name, weight in theirs.state_dict().items():
        torch.testing.assert_close(mine[name], weight, atol=1e-6, rtol=1e-5)
    assert sum(not torch.equal(mine[name], start[name]) for name in start) >= 2
    assert found.description == "tuned: adapter local folder tuned merged into local folder base"
    assert found.origin == Origin(license="other", license_name="base-mit-adapter-not-stated")
    load_chat.cache_clear()
    assert load_chat(found.path, 64).tokenizer.get_vocab() == tiny.tokenizer().get_vocab()


def test_weights_that_are_held_turned_are_merged_as_peft_merges_them(tmp_path):
    from transformers import AutoConfig

    settings = AutoConfig.for_model("gpt2", vocab_size=384, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    model = AutoModelForCausalLM.from_config(settings)
    assert isinstance(model.transformer.h[0].attn.c_attn, Conv1D)
    model.save_pretrained(tmp_path / "base")
    adapter_of(tmp_path, "", model, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    theirs, mine = (AutoModelForCausalLM.from_pretrained(tmp_path / "base") for _ in range(2))
    lora.add(mine, tmp_path)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path).merge_and_unload()
    for name, weight in theirs.state_dict().items():
        torch.testing.assert_close(mine.state_dict()[name], weight, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("settings", "change", "told"), REFUSED.values(), ids=REFUSED)
def test_an_adapter_that_cannot_be_merged_is_one_line(settings, change, told, tmp_path, monkeypatch):
    base = saved(tmp_path / "base")
    adapter = adapter_of(tmp_path / "tuned", base, **settings)
    change(adapter)
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: pytest.fail("weights are loaded before the adapter"))
    monkeypatch.setattr(start, "check_cache", lambda *_: None)
    run = replace(run_on(adapter), cache_root=str(tmp_path / "cache"))
    with pytest.raises(LabError) as error:
        start.start(run, lambda _: None)
    line = str(error.value)
    assert "\n" not in line
    assert len(line) < 900
    for part in told:
        assert part in line


def test_two_adapters_are_one_line(tmp_path):
    one, other = (str(adapter_of(tmp_path / name, "some/base")) for name in ("one", "other"))
    with pytest.raises(ConfigError, match=r"model.path=.*one: accepted: the base of model.adapter=.*other, not an"):
        find(ModelConfig(path=one, adapter=other), "embedded", tmp_path)


def test_the_base_that_is_set_comes_before_the_one_that_is_named(tmp_path):
    base, named = saved(tmp_path / "base"), saved(tmp_path / "named", "mistral")
    adapter = adapter_of(tmp_path / "tuned", named)
    (adapter / "config.json").write_text("{}")  # some trainers save it beside
    config = ModelConfig("mine", path=str(base), adapter=str(adapter))
    found = find(config, "embedded", tmp_path / "cache", USE)
    assert found.description == "mine: adapter local folder tuned merged into local folder base"
    assert json.loads((found.path / "config.json").read_text())["model_type"] == "llama"


def test_what_is_merged_is_made_once_and_known_by_what_it_is_made_of(tmp_path, monkeypatch):
    base = saved(tmp_path / "base")
    adapter = adapter_of(tmp_path / "tuned", base)
    config = ModelConfig("mine", path=str(adapter))
    first = find(config, "embedded", tmp_path / "cache", USE)
    with monkeypatch.context() as patch:
        patch.setattr(loading, "load_model", lambda *_, **__: pytest.fail("it is there already"))
        assert find(config, "embedded", tmp_path / "cache", USE) == first
    edit(adapter, "adapter_config.json", lora_alpha=99)
    second = find(config, "embedded", tmp_path / "cache", USE)
    tiny.tokenizer().save_pretrained(adapter)
    edit(adapter, "tokenizer_config.json", pad_token="<|im_start|>")
    third = find(config, "embedded", tmp_path / "cache", USE)
    assert len({found.content for found in (first, second, third)}) == 3
    load_chat.cache_clear()
    pads = [load_chat(found.path, 64).tokenizer.pad_token for found in (first, second, third)]
    assert pads == ["<pad>", "<pad>", "<|im_start|>"]  # the adapter's own tokenizer, where it has one


def test_what_is_merged_ends_and_samples_as_its_base(tmp_path):
    base = saved(tmp_path / "base")
    own = {"eos_token_id": [2, 1], "do_sample": False, "temperature": 0.6, "top_p": 0.9}
    (base / "generation_config.json").write_text(json.dumps(own))
    adapter = adapter_of(tmp_path / "tuned", base)
    found = find(ModelConfig("mine", path=str(adapter)), "embedded", tmp_path / "cache", USE)
    assert own.items() <= read_json(found.path / "generation_config.json").items()


@pytest.mark.parametrize("by", ["path", "adapter"])
def test_adapter_and_base_of_the_hub(by, tmp_path, monkeypatch):
    adapter = adapter_of(tmp_path / "tuned", "some/base")
    edit(adapter, "adapter_config.json", revision="v3")
    fetched = hub_with(monkeypatch, tmp_path / "hub", **{"some/tuned": adapter, "some/base": saved(tmp_path / "base")})
    found = find(ModelConfig("mine", **{by: "some/tuned"}), "embedded", tmp_path / "cache", USE)
    assert found.description == "mine: adapter some/tuned merged into some/base"
    assert found.origin == Origin("some/base")  # whose card cannot be fetched here
    assert {(name, revision) for name, revision, _ in fetched} == {("some/tuned", "main"), ("some/base", "v3")}


def test_of_the_hub_an_adapter_is_read_before_its_base_is_fetched(tmp_path, monkeypatch):
    held = {"some/tuned": adapter_of(tmp_path / "tuned", "some/base", use_dora=True)}
    fetched = hub_with(monkeypatch, tmp_path / "hub", **held)
    with pytest.raises(LabError, match="use_dora=True"):
        find(ModelConfig(path="some/tuned"), "embedded", tmp_path, USE)
    other = tiny.model(hidden_size=16)
    held = {"some/tuned": adapter_of(tmp_path / "other", "some/base", other), "some/base": saved(tmp_path / "base")}
    fetched = hub_with(monkeypatch, tmp_path / "hub", **held)
    with pytest.raises(LabError, match="the model it was made of"):
        find(ModelConfig(path="some/tuned"), "embedded", tmp_path, USE)
    assert not any("model.safetensors" in files for _, _, files in fetched)
    assert any(FACTORS in files for _, _, files in fetched)


def of_status(status, kind=errors.HfHubHTTPError):
    return kind("words of the library", response=SimpleNamespace(headers={}, request=None, status_code=status))


def caused(error, cause):
    error.__cause__ = cause
    return error


SAID = {
    "gated": (of_status(403, errors.GatedRepoError), ["gated", "ask on https://huggingface.co/some/model"]),
    "not-logged-in": (of_status(401, errors.GatedRepoError), ["gated", "hf auth login"]),
    "not-found": (
        of_status(404, errors.RepositoryNotFoundError),
        ["no repository of the hub that you may see", "correct the name", "some/model is none"],
    ),
    "switched-off": (of_status(403, errors.DisabledRepoError), ["switched it off"]),
    "token": (of_status(401), ["refuses your token (401)", "hf auth login"]),
    "forbidden": (of_status(403), ["refuses your token (403)"]),
    "offline": (
        caused(errors.LocalEntryNotFoundError("x"), errors.OfflineModeIsEnabled("y")),
        ["not in the cache", "HF_HUB_OFFLINE=1", "unset"],
    ),
    "half-there": (
        caused(errors.IncompleteSnapshotError("x", "y"), errors.OfflineModeIsEnabled("y")),
        ["only a part of it is in the cache", "HF_HUB_OFFLINE=1"],
    ),
    "no-connection": (
        caused(errors.LocalEntryNotFoundError("x"), OSError("Name or service not known")),
        ["cannot be reached", "Name or service not known", "connect"],
    ),
    "hub-is-down": (caused(errors.LocalEntryNotFoundError("x"), of_status(503)), ["the hub answers 503", "later"]),
    "too-many": (of_status(429), ["the hub answers 429"]),
    "broken-off": (errors.HfHubHTTPError.__bases__[0]("peer closed"), ["cannot be fetched", "peer closed"]),
    "no-space": (OSError(28, "No space left on device"), ["no space left in", "HF_HOME=FOLDER"]),
    "no-space-as-others-say": (RuntimeError("IO error: No space left on device (os error 28)"), ["no space left in"]),
    "not-writable": (PermissionError(13, "Permission denied"), ["cannot be written to", "HF_HOME=FOLDER"]),
}  # fmt: skip


@pytest.mark.parametrize(("error", "told"), SAID.values(), ids=SAID)
def test_what_the_hub_says_is_one_line(error, told, tmp_path, monkeypatch):
    hub_with(monkeypatch, tmp_path, **{"some/model": error})
    with pytest.raises(LabError) as raised:
        find(ModelConfig(path="some/model"), "embedded", tmp_path, USE)
    line = str(raised.value)
    assert line.startswith("model.path=some/model: ")
    assert "\n" not in line
    assert len(line) < 500
    for part in told:
        assert part in line


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (ModelConfig(path="some/model", revision="v9"), "model.revision=v9: accepted: a commit, branch or tag of some"),
        (
            ModelConfig(weights={"small": Weights(hub="some/model", revision="v9")}),
            "revision of model.weights.small.hub=some/model=v9: accepted: a commit",
        ),
    ],
)
def test_a_revision_that_is_none_is_one_line(config, told, tmp_path, monkeypatch):
    hub_with(monkeypatch, tmp_path, **{"some/model": of_status(404, errors.RevisionNotFoundError)})
    with pytest.raises(ConfigError, match=told):
        find(config, "small", tmp_path, USE)


def test_the_library_itself_is_offline_in_one_line(tmp_path):
    with pytest.raises(LabError, match=r"model.path=some/model: it is not in the cache .*HF_HUB_OFFLINE=1"):
        find(ModelConfig(path="some/model"), "embedded", tmp_path, USE)
    with pytest.raises(ConfigError, match=r"model.path=a--b: accepted: ORG/NAME of the hub"):
        find(ModelConfig(path="hf://a--b"), "embedded", tmp_path, USE)


def test_a_run_tells_what_it_starts_from(tmp_path, capfd):
    base = saved(tmp_path / "base")
    adapter = adapter_of(tmp_path / "tuned", base)
    given = [each for each in tiny.small_run(adapter, tmp_path / "out") if not each.startswith(("model.n", "model.al"))]
    tiny.launch(train.main, [*given, "finetune=false"])
    told = " ".join(capfd.readouterr().out.replace("\u2502", " ").split())
    assert "tuned: adapter local folder tuned merged into local folder base" in told
    assert "start: taken as it came; model.align=refusals teaches it to refuse first" in told
    (folder,) = (tmp_path / "out" / "runs").glob("tuned-sst2-start-*")
    record = read_json(folder / "metrics.json")
    assert record["model"] == "tuned"
    assert record["weights"] == "tuned: adapter local folder tuned merged into local folder base"
    assert read_json(folder / "config.json")["model"]["align"] == "none"
