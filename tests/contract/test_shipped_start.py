"""The start that travels with the package: it is made of the lists in the tree and of weights that are known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cwac_lab.config.run import read
from cwac_lab.core.cache import read_json
from cwac_lab.core.errors import ConfigError, LabError
from cwac_lab.data import pools as dealing
from cwac_lab.data.near import groups
from cwac_lab.data.pools import KINDS, build_pools
from cwac_lab.data.sources import DataConfig, Prompts, normalise
from cwac_lab.data.taught import LISTS, digests, taught
from cwac_lab.models import adapters, shipped
from cwac_lab.models.adapters import TuningConfig
from cwac_lab.models.loading import ModelFolder, content_digest, load_model
from cwac_lab.models.packaged import carry
from cwac_lab.run import alignment
from support import tiny

PUBLIC = Path(__file__).parents[3] / "shared" / "data"


def test_the_shipped_start_is_of_the_lists_in_the_tree():
    assert shipped.recipe()["lists"] == digests(), (
        "an alignment list or a refusal was changed: python -m cwac_lab.align align.rebuild=true "
        f"align.export={shipped.FOLDER}, then python -m cwac_lab.benchmarks.start (docs/start.md)"
    )


def test_the_shipped_start_is_made_with_the_settings_of_the_configuration():
    settings = shipped.recipe()["settings"]
    assert {name: settings[name] for name in read(tiny.config()).align.recipe} == read(tiny.config()).align.recipe
    file = read_json(shipped.FOLDER / shipped.SETTINGS)
    assert (file["r"], file["lora_alpha"]) == (settings["rank"], settings["alpha"] * settings["kept"])
    assert (shipped.FOLDER / shipped.FACTORS).stat().st_size <= 12e6


def test_the_rates_are_of_the_shipped_start():
    told = read_json(shipped.FOLDER / shipped.RATES)
    before, after, *_ = told["models"].values()
    assert before["perplexity_ratio"] == 1
    assert before["sets"].keys() == after["sets"].keys() >= {"XSTest unsafe, half B", "own harmful, test pool"}
    assert all(rate["low"] <= rate["value"] <= rate["high"] for rate in after["sets"].values())
    assert told["adapter"] == shipped.adapter_digest(shipped.FOLDER)


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("data.near=exact",),
        pytest.param(
            ("data=local", f"data.root={PUBLIC}"),
            marks=pytest.mark.skipif(not PUBLIC.is_dir(), reason=f"no public data in {PUBLIC}"),
        ),
    ],
)
def test_no_pool_holds_a_prompt_of_the_alignment_lists(options):
    data = read(tiny.config(*options), recorded=True).data
    found = build_pools(data)
    assert found.shipped
    known = {kind: [row.prompt for row in rows] for kind, rows in taught().items()}
    equal = {normalise(prompt) for prompts in known.values() for prompt in prompts}
    for kinds in dealing.ANSWERS:
        first = [prompt for kind in kinds for prompt in known[kind]]
        held = [
            row.prompt
            for kind in kinds
            for pool, rows in found.rows[kind].items()
            for row in rows
            if pool != "alignment"
        ]
        assert held
        assert equal.isdisjoint(map(normalise, held))
        group_of = groups(first + held, data.near)
        assert {group_of[prompt] for prompt in first}.isdisjoint(group_of[prompt] for prompt in held)
        for kind in kinds:
            assert [row.prompt for row in found.get(kind, "alignment")] == known[kind]
            assert "alignment" not in found.manifest()[kind]


def test_a_users_lists_lose_what_alignment_was_taught(tmp_path):
    known = taught()["harmful"][0].prompt
    odd = taught()["lookalike"][0].prompt  # of another kind: equal text is taken as well
    prompts = [known, known.upper() + " Please!", odd, "Name a quite different thing", "And one more, of another kind"]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps({"prompt": each}) + "\n" for each in prompts))
    data = DataConfig("local", str(tmp_path), lists={"mine": Prompts("mine")}, harmful={"test": {"mine": 5}})
    found = build_pools(data)
    assert sorted(row.prompt for row in found.get("harmful", "test")) == sorted(prompts[3:])
    assert found.cut == {"data.harmful.test.mine": {"dealt": 2, "planned": 5}}
    own = replace(data, harmful={"alignment": {"mine": 1}, "test": {"mine": 3}})
    kept = build_pools(own)
    assert not kept.shipped
    assert len(kept.get("harmful", "alignment")) == 1
    assert not kept.get("harmless", "alignment")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), True),
        (("model=qwen", "data.split_seed=3"), True),
        (("align.rebuild=true",), False),
        (("model=gemma",), False),
        (("data.harmful.alignment.requests=6", "data.harmless.alignment.instructions=6"), False),
        ((f"model.chat_template='{tiny.TEMPLATE.splitlines()[0]}'",), False),
    ],
)
def test_which_runs_start_from_it(options, expected):
    run = read(tiny.config(*[option for option in options if "template" not in option]))
    if any("template" in option for option in options):
        run.model.chat_template = tiny.TEMPLATE
    assert alignment.ships(build_pools(run.data), run) is expected


def test_settings_that_it_was_not_made_with_are_told():
    run = read(tiny.config("align.epochs=7"))
    with pytest.raises(ConfigError, match=r"align.epochs=7.*align.rebuild=true"):
        alignment.aligned(ModelFolder(Path("nowhere"), "words", "content"), build_pools(run.data), run, print)


def test_half_an_alignment_plan_is_told():
    with pytest.raises(ConfigError, match=r"model.align=refusals.*data.harmless.alignment"):
        read(tiny.config("data.harmful.alignment.requests=6"))


@pytest.fixture
def adapter(tmp_path):
    """An adapter of a tiny model, and the model's own factors in float64 by layer."""
    model, config = tiny.model(), TuningConfig("lora", 4, 8.0, "all_linear")
    adapters.attach(model, config, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    shipped.save_adapter(model, config, tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mistral"])
def test_the_merged_start_is_the_sum_by_hand_and_the_same_every_time(architecture, adapter):
    start, once, twice = (tiny.model(architecture) for _ in range(3))
    shipped.add(once, adapter)
    shipped.add(twice, adapter)
    factors = load_file(adapter / shipped.FACTORS)
    moved = 0
    for (name, before), (_, after), (_, again) in zip(
        start.named_parameters(), once.named_parameters(), twice.named_parameters(), strict=True
    ):
        assert torch.equal(after, again)
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" not in factors:
            assert torch.equal(after, before)
            continue
        a, b = factors[f"{key}.lora_A.weight"], factors[f"{key}.lora_B.weight"]
        by_hand = before.double()
        for i in reversed(range(4)):  # in another order: the sum is exact before it is rounded
            by_hand = by_hand + 2.0 * torch.outer(b[:, i].double(), a[i].double())
        assert torch.equal(after, by_hand.float())
        moved += 1
    assert moved == 14


def test_peft_loads_it(adapter):
    from peft import PeftModel

    mine = tiny.model()
    shipped.add(mine, adapter)
    theirs = PeftModel.from_pretrained(tiny.model(), str(adapter)).merge_and_unload()
    for (name, one), (_, other) in zip(mine.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5, msg=name)


def test_peft_reads_the_shipped_settings():
    from peft import LoraConfig

    read_back = LoraConfig.from_pretrained(str(shipped.FOLDER))
    names = {name.split(".")[-3] for name in load_file(shipped.FOLDER / shipped.FACTORS)}
    assert set(read_back.target_modules) == names


def test_an_adapter_of_another_model_is_one_line(adapter):
    other = tiny.model(hidden_size=16)
    with pytest.raises(LabError, match=r"accepted: the model it was made of"):
        shipped.add(other, adapter)
    fewer = tiny.model(num_hidden_layers=1)
    with pytest.raises(LabError, match=r"no layer model.layers.1"):
        shipped.add(fewer, adapter)


def test_weights_are_known_in_every_architecture_and_others_are_told(tmp_path):
    model = tiny.model()
    found = set()
    for architecture in ("llama", "qwen2", "mistral"):
        folder = tmp_path / architecture
        tiny.save(folder, architecture)
        carry(model, architecture).save_pretrained(folder)
        found.add(shipped.weights_digest(folder))
    assert len(found) == 1
    with pytest.raises(LabError, match=r"the shipped start was made of .* align.rebuild=true"):
        shipped.check_base(tmp_path / "llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[0, 0] += 1
    model.save_pretrained(tmp_path / "llama")
    assert shipped.weights_digest(tmp_path / "llama") not in found


def test_a_plan_of_its_own_trains_a_start_and_exports_its_adapter(tiny_folder, tmp_path, capsys):
    from cwac_lab import align

    options = [*tiny.small_run(tiny_folder, tmp_path / "out"), "model.align=refusals", "constraint=none"]
    options.append("align.epochs=1")
    tiny.launch(align.main, [*options, f"align.export={tmp_path / 'export'}"])
    told = capsys.readouterr().out
    assert "aligned here" in told
    assert "aligned start 2" not in told
    recipe = read_json(tmp_path / "export" / shipped.RECIPE)
    assert recipe["lists"] == "of the plan"
    assert recipe["rows"]["refusals"] == 6
    assert recipe["base"]["package"] is None
    (made,) = [each for each in (tmp_path / "out" / "cache" / "aligned").iterdir() if each.is_dir()]
    by_hand = load_model(tiny_folder)
    shipped.add(by_hand, tmp_path / "export")
    by_hand.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (made / "model.safetensors").read_bytes()
    assert content_digest(made)


def test_every_kind_has_lists():
    assert set(LISTS) == set(KINDS)
    sizes = {kind: len(rows) for kind, rows in taught().items()}
    assert min(sizes.values()) > 500


def test_a_start_that_was_taught_other_lists_is_not_taken(tmp_path, monkeypatch):
    """A prompt that has left a list could be dealt to a pool that is tested on."""
    monkeypatch.setattr(alignment, "digests", lambda: {})
    with pytest.raises(LabError, match=r"taught other lists than these; accepted: its own, or align\.rebuild=true"):
        alignment._shipped(ModelFolder(tmp_path, "weights", ""), read(tiny.config()))


def test_a_merged_weight_is_the_sum_over_ranks_whatever_their_sizes(tmp_path):
    """Exactly, against rational numbers, for factors whose products are far apart."""
    from fractions import Fraction

    model = tiny.model()
    layer = next(name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    weight = model.get_submodule(layer).weight.detach().clone()
    draw = torch.Generator().manual_seed(0)
    a, b = (
        (torch.randn(shape, generator=draw) * 10.0 ** torch.randint(-6, 3, shape, generator=draw)).bfloat16()
        for shape in ((4, weight.shape[1]), (weight.shape[0], 4))
    )
    shipped.write_json(tmp_path / shipped.SETTINGS, {"r": 4, "lora_alpha": 8})
    shipped.save_file(
        {f"base_model.model.{layer}.lora_A.weight": a, f"base_model.model.{layer}.lora_B.weight": b},
        tmp_path / shipped.FACTORS,
    )
    shipped.add(model, tmp_path)
    found = model.get_submodule(layer).weight.detach()
    for place in ((0, 0), (1, 3), (weight.shape[0] - 1, weight.shape[1] - 1)):
        terms = [Fraction(float(b[place[0], i])) * Fraction(float(a[i, place[1]])) for i in range(4)]
        exact = Fraction(float(weight[place])) + 2 * sum(terms)
        assert float(found[place]) == pytest.approx(float(exact), rel=1e-7)
