"""What a run would take is told before weights are loaded."""

from __future__ import annotations

import json

import pytest
import torch

from cwac_lab import train
from cwac_lab.config.run import read
from cwac_lab.defenses.cwac.null_space import attach as attach_free
from cwac_lab.models.adapters import TARGETS, TuningConfig, attach
from cwac_lab.models.sites import linears
from cwac_lab.run import estimate
from support import tiny
from support.held import PROMPTS, context

ADAPTED = [*(("llama", modules) for modules in TARGETS), ("phi3", "all_linear"), ("qwen3_moe", "all_linear")]


@pytest.mark.parametrize(("architecture", "modules"), ADAPTED)
def test_the_factors_that_are_counted_are_those_that_are_attached(architecture, modules):
    model = tiny.model(architecture, **tiny.MIXTURES.get(architecture, {}))
    tuning = TuningConfig(method="lora", rank=3, modules=modules, base="bfloat16")
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    counted = estimate.trained_parameters(skeleton, tuning)
    attach(model, tuning, seed=0)
    assert counted == sum(each.numel() for name, each in model.named_parameters() if "lora_" in name)
    assert all(each.requires_grad for each in skeleton.parameters())  # it is as it was


def test_a_dry_run_tells_rows_steps_memory_disk_and_time(tiny_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("cwac_lab.run.start.load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    rows = [{"prompt": f"Ask {i}", "response": "yes " * i} for i in range(1, 21)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = [each for each in tiny.small_run(tiny_folder, tmp_path / "out") if not each.startswith("data.n_")]
    given = [*small, "task=chat", f"task.train={tmp_path}/rows.jsonl", "trainer.epochs=3", "constraint=none"]
    tiny.launch(train.main, [*given, "dry=true"])
    told = " ".join(capsys.readouterr().out.split())
    for part in (
        "18 rows, 36 turns",
        "18 examples, 15 steps",
        " M parameters",
        "memory: ",
        "disk: ",
        "training: about",
    ):
        assert part in told
    assert "keeps" not in told
    tiny.launch(train.main, [*given[:-1], "constraint=[weight,lisa]", "dry=true"])
    told = " ".join(capsys.readouterr().out.split())
    assert "moments, 0.0 GB for what the constraint keeps;" in told
    tiny.launch(train.main, [*given[:-1], "constraint=weight", "tuning=null_space", "dry=true"])
    told = " ".join(capsys.readouterr().out.split())
    assert "trained, about (python -m cwac_lab.prepare tells what share is free)" in told
    assert not (tmp_path / "out" / "runs").exists()


@pytest.mark.parametrize(("constraint", "copies"), [("none", 0), ("weight", 1), ("[weight,lisa]", 3), ("kl", 0)])
def test_copies_of_weights_are_counted_with_full_tuning(constraint, copies):
    model, width = tiny.model(), 4
    size = sum(each.numel() for each in model.parameters())
    example = tiny.chat().encode("a question", "an answer")
    for tuning in ("full", "lora"):
        run = read(tiny.config(f"constraint={constraint}", f"tuning={tuning}"))
        found = estimate.estimate(run, model, [example] * 8)
        if tuning == "full" or "weight" not in constraint:
            assert found.kept == (copies * width * found.trained if tuning == "full" else 0)
    plain = read(tiny.config("constraint=none"))
    assert estimate.estimate(plain, model, [example] * 8).memory == width * 4 * size


@pytest.mark.parametrize("trainable", ["constrained", "all"])
@pytest.mark.parametrize("modules", ["all_linear", "ffn_out"])
def test_what_a_constraint_freezes_does_not_count_as_trained(trainable, modules):
    model, example = tiny.model(), tiny.chat().encode("a question", "an answer")
    given = [f"constraint.weight.trainable={trainable}", f"constraint.weight.modules={modules}"]
    run = read(tiny.config("constraint=weight", *given))
    found = estimate.estimate(run, model, [example])
    run.constraint.prepare(context(model, run.constraint))
    assert found.trained == sum(each.numel() for each in model.parameters() if each.requires_grad)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("opening", ["held", "counted"])
@pytest.mark.parametrize("n", ["null", 4])
def test_with_a_fixed_rank_what_the_constraint_leaves_free_is_counted(architecture, opening, n):
    model, chat = tiny.model(architecture), tiny.chat()
    reference = [chat.prompt_ids(prompt) for prompt in PROMPTS]
    held = ["constraint.weight.energy=null", "constraint.weight.rank=5", f"constraint.weight.opening={opening}"]
    run = read(
        tiny.config(
            "constraint=weight", "tuning=null_space", "tuning.modules=ffn", *held, f"tuning.free_directions={n}"
        )
    )
    example = chat.encode("a question", "an answer")
    found = estimate.estimate(run, model, [example] * 8, reference)
    assert found.guessed == (n == "null")
    parts = context(model, run.constraint)
    attach_free(model, run.tuning, 0, run.constraint.requirements.subspace, parts.subspace, [example.input_ids] * 8)
    assert found.trained == sum(each.numel() for each in model.parameters() if each.requires_grad)
    fixed = sum(each.numel() for name, each in model.named_parameters() if "lora_A" in name)
    spans = sum(span.columns.numel() for span in parts.subspace.spans.values())
    assert found.kept == pytest.approx(4 * (fixed + spans), rel=0.1)  # tokens that are alike have fewer directions


def test_no_more_directions_are_protected_than_reference_prompts_have_tokens():
    model, chat = tiny.model(), tiny.chat()
    reference = [[1, 2, 3, 4], [1, 2, 5], [1, 2, 6, 7, 8]]
    given = ["constraint=weight", "tuning=null_space", "tuning.modules=ffn"]
    run, example = read(tiny.config(*given)), chat.encode("a question", "an answer")
    assert estimate.most_protected(run, reference) == 2 + 6
    found = estimate.estimate(run, model, [example] * 8, reference)
    shapes = [tuple(each.weight.shape) for each in linears(model, "ffn")]
    assert found.trained == sum(rows * (width - 8) for rows, width in shapes)
    assert found.guessed
    many = estimate.estimate(run, model, [example] * 8, [[1, *range(n, n + 50)] for n in range(50)])
    assert many.trained == sum(rows * round(estimate.FREE * width) for rows, width in shapes)
    assert not estimate.estimate(read(tiny.config()), model, [example] * 8).guessed


def test_bits_of_frozen_weights_and_the_merge_in_float32_are_counted():
    model, example = tiny.model(), tiny.chat().encode("a question", "an answer")
    found = {
        base: estimate.estimate(
            read(tiny.config("constraint=none", "tuning=lora", f"tuning.base={base}")), model, [example]
        )
        for base in ("float32", "bfloat16", "nf4")
    }
    size = sum(each.numel() for each in model.parameters())
    adapted = sum(each.weight.numel() for each in linears(model, "all_linear"))
    assert found["float32"].memory - found["bfloat16"].memory == 2 * size
    assert found["bfloat16"].memory - found["nf4"].memory == round((2 - 0.5625) * adapted)
    assert [each.merged for each in found.values()] == [0, 4 * size, 4 * size]
