"""The adapter that a run saves gives the model that the run made, on the base as it is, by PEFT itself."""

from __future__ import annotations

import json
import re

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from cwac_lab import train
from cwac_lab.core.paths import conf_dir
from cwac_lab.models.loading import ModelConfig, find, load_model
from support import tiny
from support.cover import some

pytestmark = pytest.mark.slow

MERGED_ONLY = {"safe_delta"}  # refused in one line: tests/config
EVERY = sorted({file.stem for file in (conf_dir() / "constraint").glob("*.yaml")} - MERGED_ONLY)
FEW_LATENTS = ("constraint.activation.n_latents=4", "constraint.activation.depths=[0.5]")
MORE = {
    **dict.fromkeys(("activation", "coupled"), FEW_LATENTS),
    **dict.fromkeys(("asft", "safelora"), ("model.base=BEFORE",)),  # the model before its alignment
}


def flat(capsys):
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("constraint", some(EVERY, "weight", "coupled", "safelora"))
def test_an_adapter_of_a_run_is_the_model_that_it_made(constraint, tiny_folder, tmp_path):
    given = tiny.small_run(tiny_folder, tmp_path / "out")
    more = ["tuning=lora", "tuning.rank=4", "tuning.save=both", f"constraint={constraint}"]
    before = tiny.save(tmp_path / "before", seed=1)
    more += ["trainer.learning_rate=1e-2", *(each.replace("BEFORE", str(before)) for each in MORE.get(constraint, ()))]
    tiny.launch(train.main, [*given, *more])
    (folder,) = (tmp_path / "out" / "runs").iterdir()
    ids = torch.arange(3, 40)[None]
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    start = base(ids).logits
    tuned = PeftModel.from_pretrained(base, folder / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    torch.testing.assert_close(tuned(ids).logits, merged(ids).logits, atol=2e-4, rtol=1e-4)
    assert not torch.allclose(start, merged(ids).logits, atol=1e-2)
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    cards = [(folder / kind / "README.md").read_text() for kind in ("adapter", "model")]
    assert cards[0].replace("library_name: peft", "library_name: transformers") == cards[1]


@pytest.mark.parametrize("base", ["float32", "bfloat16"])
def test_factors_of_a_rank_for_each_layer_are_saved_so_that_peft_reads_them(base, tiny_folder, tmp_path):
    given = tiny.small_run(tiny_folder, tmp_path / "out")
    more = ["tuning=null_space", "tuning.save=both", f"tuning.base={base}", "trainer.learning_rate=1e-2"]
    tiny.launch(train.main, [*given, *more, "constraint=weight", "constraint.weight.energy=0.9"])
    (folder,) = (tmp_path / "out" / "runs").iterdir()
    ids = torch.arange(3, 40)[None]
    start = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    tuned = PeftModel.from_pretrained(start, folder / "adapter")
    ranks = json.loads((folder / "adapter" / "adapter_config.json").read_text())["rank_pattern"]
    assert len(set(ranks.values())) > 1
    if base == "float32":
        torch.testing.assert_close(tuned(ids).logits, merged(ids).logits, atol=2e-4, rtol=1e-4)
    assert json.loads((folder / "metrics.json").read_text())["leak"] < 1e-4
    # The adapter is a start of its own.
    found = find(ModelConfig("mine", path=str(folder / "adapter")), "embedded", tmp_path / "merged")
    torch.testing.assert_close(load_model(found.path)(ids).logits, tuned(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "qwen3_moe"])
def test_other_families_too_and_what_is_free_of_them_is_said(family, tmp_path, capsys):
    start, merged = tiny.model(family, **tiny.MIXTURES.get(family, {}) | {"num_experts": 64}), tmp_path / "merged"
    start.save_pretrained(tmp_path / "start")
    tiny.tokenizer().save_pretrained(tmp_path / "start")
    given = tiny.small_run(tmp_path / "start", tmp_path / "out")
    more = ["tuning=lora", "tuning.save=both", "constraint=weight", "constraint.weight.energy=0.9"]
    tiny.launch(train.main, [*given, *more])
    said = re.findall(r"(\d+) of 128 experts read no token of the reference prompts: they are free", flat(capsys))
    assert [0 < int(n) < 128 for n in said] == ([True] if family == "qwen3_moe" else [])
    (folder,) = (tmp_path / "out" / "runs").iterdir()
    ids = torch.arange(3, 40)[None]
    saved = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    assert json.loads((folder / "metrics.json").read_text())["leak"] < 1e-5
    assert (saved(ids).logits - start(ids).logits).abs().max() > 1e-4
    # The adapter is a start of its own, merged once into its base.
    found = find(ModelConfig("mine", path=str(folder / "adapter")), "embedded", merged)
    torch.testing.assert_close(load_model(found.path)(ids).logits, saved(ids).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("save", "there"), [("merged", {"model"}), ("adapter", {"adapter"})])
def test_what_is_saved_is_what_is_asked_for(save, there, tiny_folder, tmp_path, capsys):
    given = tiny.small_run(tiny_folder, tmp_path / "out")
    tiny.launch(train.main, [*given, "tuning=lora", f"tuning.save={save}", "constraint=none"])
    (folder,) = (tmp_path / "out" / "runs").iterdir()
    assert {path.name for path in folder.iterdir() if path.name in ("model", "adapter")} == there
    lacks = ({"model", "adapter"} - there).pop()
    line = tiny.error_of(train.main, [*given, "tuning=lora", "tuning.save=both", "constraint=none"], capsys)
    assert line.startswith("already done, but ")
    assert f" has no {lacks}/ (" in line


def test_all_weights_have_no_adapter(tiny_folder, tmp_path, capsys):
    given = tiny.small_run(tiny_folder, tmp_path / "out")
    line = tiny.error_of(train.main, [*given, "+tuning.save=adapter"], capsys)
    assert line.startswith("tuning.save=adapter: accepted: merged")
