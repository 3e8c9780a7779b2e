"""The benchmarks run and say what they should; what they measure is no test."""

import json
import math
import multiprocessing.dummy
import re
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from cwac_lab.benchmarks import generation, start, steps, subspace, timing, trainers
from cwac_lab.config.run import read
from cwac_lab.core.errors import ConfigError, LabError
from cwac_lab.data.batches import collate
from cwac_lab.training.settings import TrainerConfig
from support import tiny


@pytest.mark.parametrize("started", ["thread", pytest.param("process", marks=pytest.mark.exhaustive)])
def test_every_way_of_the_subspace_is_measured_against_the_dense_one(started, capsys, monkeypatch):
    """A process of its own imports torch for seconds; what is computed in it is the same in a thread."""
    if started == "thread":
        monkeypatch.setattr(subspace, "multiprocessing", SimpleNamespace(get_context=lambda *_: multiprocessing.dummy))
    sizes = {"width": 96, "out": 40, "tokens": 64, "rank": 4, "step-tokens": 16, "threads": 1, "repeats": 1}
    subspace.main([word for name, size in sizes.items() for word in (f"--{name}", str(size))])
    lines = capsys.readouterr().out.splitlines()
    assert "chosen by cost: randomized" in lines
    rows = {cells[1].strip(): [c.strip() for c in cells[2:-1]] for line in lines if len(cells := line.split("|")) > 3}
    for way in subspace.WAYS:
        assert float(rows[way][-1]) > (0.999 if way != "randomized" else 0.9)
    assert rows["gram"][4] == f"{4 / 96:.2%}"
    assert rows["full SVD, dense projector"][4] == "100.00%"
    assert {f"{what}, k = {k}" for what in ("gradient", "weights") for k in (64, 128, 512)} < rows.keys()


class _Line:
    """What a process of a benchmark is told and reports, here by a list."""

    def __init__(self, label, seconds, heard):
        self.label, self.seconds, self.heard = label, list(seconds), heard

    def send(self, _):
        self.heard.append(self.label)

    def recv(self):
        if not self.seconds:
            raise EOFError
        return self.seconds.pop(0)


def test_constraints_take_steps_in_turn_and_are_compared_within_a_round():
    heard = []
    lines = {"none": _Line("none", [1, 1, 2, 2], heard), "weight": _Line("weight", [1, 2, 2, 3], heard)}
    taken = steps.in_turn(lines, 4)
    assert heard == ["none", "weight", "weight", "none"] * 2
    _, _, none, weight = steps.table(taken, 2).splitlines()
    assert none == "| none | 1.50 (n=4) | 1.00 (1.00 to 1.00) | 2 |"
    assert weight == "| weight | 2.00 (n=4) | 1.38 (1.25 to 1.50) | 2 |"
    with pytest.raises(LabError, match="training with none ended at step 1"):
        steps.in_turn(lines, 1)


def test_a_benchmark_times_what_it_is_asked_to():
    config = tiny.config("constraint=coupled")
    plain, asked = timing.split_off(config, 12, 3)
    assert (plain, asked) == (config, timing.Timing(None, 12, 3))
    assert asked.only(["none", "weight"]) == ["none", "weight"]
    OmegaConf.set_struct(config, False)
    config.benchmark = {"ways": ["coupled"], "rounds": 1}
    found, asked = timing.split_off(config, 12, 3)
    assert (found, asked) == (plain, timing.Timing(["coupled"], 12, 1))
    assert asked.only(["none", "weight", "coupled"]) == ["none", "coupled"]  # beside plain fine-tuning
    with pytest.raises(ConfigError, match=re.escape("benchmark.ways=coupled: accepted: none | l2")):
        asked.only(["none", "l2"])


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"steps": 0}, "benchmark.steps=0: accepted: an integer >= 1"),
        ({"rounds": True}, "benchmark.rounds=True: accepted: an integer >= 1"),
        ({"ways": "none"}, "benchmark.ways=none: accepted: a list of ways"),
        ({"ways": []}, "benchmark.ways=[]: accepted: a list of ways"),
        (3, "benchmark=3: accepted: a mapping with ways | steps | rounds"),
        (None, "benchmark=None: accepted: a mapping with ways | steps | rounds"),
        (["none"], "benchmark=['none']: accepted: a mapping with ways | steps | rounds"),
        ({"turns": 3}, "benchmark.turns=3: accepted: ways | steps | rounds"),
    ],
)
def test_what_a_benchmark_cannot_time_is_told(given, told):
    with pytest.raises(ConfigError, match=re.escape(told)):
        timing.split_off(OmegaConf.create({"benchmark": given}), 12, 3)


def test_a_label_names_a_part_or_the_whole(tiny_folder, tmp_path):
    given = [each for each in tiny.small_run(tiny_folder, tmp_path) if not each.startswith("constraint")]
    run = read(tiny.config(*given, "constraint=coupled", "constraint.activation.n_latents=4"))
    found = {label: steps.chosen(run, label) for label in steps.labels(run)}
    assert {label: (list(each.constraint.parts), each.tuning.method) for label, each in found.items()} == {
        "none": ([], "full"),
        "weight": (["weight"], "full"),
        "activation": (["activation"], "full"),
        "coupled": (["weight", "activation"], "full"),
        "coupled, tuning=null_space": (["weight", "activation"], "null_space"),
    }


@pytest.mark.parametrize(
    ("more", "labels"),
    [
        (["constraint=weight", "tuning=lora"], ["none", "weight"]),
        (["constraint=weight", "constraint.weight.tail=slowed", "constraint.weight.tail_energy=1"], ["none", "weight"]),
        (["constraint=l2"], ["none", "l2"]),
    ],
)
def test_what_cannot_be_factors_is_not_timed_so(more, labels, tiny_folder, tmp_path):
    assert steps.labels(read(tiny.config(*tiny.small_run(tiny_folder, tmp_path), *more))) == labels


def test_factors_are_those_of_the_scope_and_plain_fine_tuning_has_none(tiny_folder, tmp_path):
    given = [*tiny.small_run(tiny_folder, tmp_path), "constraint=weight", "constraint.weight.modules=ffn_out"]
    run = read(tiny.config(*given))
    assert steps.chosen(run, steps.labels(run)[-1]).tuning.modules == "ffn_out"
    run = read(tiny.config(*given, "tuning=null_space", "tuning.modules=ffn_out"))
    assert [steps.chosen(run, label).tuning.method for label in steps.labels(run)] == ["full", "null_space"]


def test_experts_are_not_timed_in_factors(tmp_path):
    tiny.model("qwen3_moe", **tiny.MIXTURES["qwen3_moe"]).save_pretrained(tmp_path / "start")
    tiny.tokenizer().save_pretrained(tmp_path / "start")
    run = read(tiny.config(*tiny.small_run(tmp_path / "start", tmp_path), "constraint=weight"))
    assert steps.labels(run) == ["none", "weight"]


@pytest.mark.exhaustive
def test_every_constraint_takes_its_steps_in_a_process_of_its_own(tiny_folder, tmp_path, capsys):
    timed = ["+benchmark.rounds=1", "+benchmark.ways=[none,weight]"]
    chosen = ["constraint=weight", "trainer.batch_size=1", "trainer.epochs=3", *timed]
    tiny.launch(steps.main, [*tiny.small_run(tiny_folder, tmp_path), *chosen])
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith(("| none | ", "| weight"))]
    assert [row.split("(n=")[1][:2] for row in rows] == ["12", "12"]
    assert any(line.lstrip("- ").startswith("the first step of none: ") for line in lines)


def test_the_limit_of_a_step_is_counted():
    model, chat = tiny.model(), tiny.chat()
    batch = collate([chat.encode("question", "an answer")], chat.pad_id)
    found = steps.limit(model, batch)
    layers = sum(p.numel() for name, p in model.named_parameters() if "proj" in name)
    tokens = batch["input_ids"].shape[1]
    assert found["tflop"] * 1e12 >= 5 * layers * (tokens - 1)  # forward, and backward to weights and inputs
    assert found["adamw_gb"] == pytest.approx(28e-9 * sum(p.numel() for p in model.parameters()))
    assert found["seconds"] == pytest.approx(found["tflop"] * 1e3 / found["gflops"])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_busiest_operators_of_a_step_are_named():
    model, chat = tiny.model(), tiny.chat()
    shares = steps.busiest(model, collate([chat.encode("question", "an answer")], chat.pad_id), 50)
    assert "aten::mm" in shares
    assert any("adamw" in name.lower() for name in shares)
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    assert sum(shares.values()) <= 1 + 1e-9


@pytest.mark.exhaustive
def test_every_trainer_is_measured_on_the_same_rows(tmp_path):
    pytest.importorskip("trl", reason="TRL is not installed")
    chat = tiny.chat()
    rows = [chat.encode(f"question {i} " + "more " * (i % 5), f"an answer {i}") for i in range(20)]
    ids, labels = [row.input_ids for row in rows], [row.labels for row in rows]
    settings = asdict(TrainerConfig(batch_size=4, progress_bar=False))
    shared = trainers._Rows(str(tiny.save(tmp_path)), ids, labels, chat.pad_id, settings)
    found = trainers.compare(shared, 1, 1)
    assert list(found) == list(trainers.WAYS)
    assert all(each.tokens_per_second > 0 and each.peak_gb > 0.1 for (each,) in found.values())
    lines = trainers.table(found).splitlines()
    assert lines[2].startswith("| cwac-lab | ")
    assert " | 1.00 | " in lines[2]


def test_batch_sizes_of_generation_are_timed_on_the_same_prompts():
    asked = []

    def ask(size: int) -> list[str]:
        asked.append(size)
        return ["alike", "alike" if size < 4 else "unlike"]

    seconds, unlike = generation.compare(ask, (1, 2, 4), 3)
    assert asked == [1, 2, 4] * 3
    assert unlike == {1: 0, 2: 0, 4: 1}
    first, _, last = generation.table("harmful", 2, seconds, unlike).splitlines()
    assert "| 1.00 | 0 of 2 |" in first
    assert last.endswith("1 of 2 |")


def test_sets_that_are_not_there_are_told_and_halves_share_no_prompt(tmp_path):
    said = []
    assert start.public_sets(None, said.append) == []
    assert len(said) == len(start.PUBLIC) + 1
    assert all("left out, no " in line and line.endswith("under data.root=None") for line in said)
    (tmp_path / "xstest").mkdir()
    rows = [{"prompt": f"prompt {i}", "safe": i < 3} for i in range(8)]
    (tmp_path / "xstest" / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {each.name: [row.prompt for row in each.rows] for each in start.public_sets(tmp_path, said.append)}
    assert found == {
        "XSTest unsafe, half A": ["prompt 3", "prompt 5", "prompt 7"],
        "XSTest unsafe, half B": ["prompt 4", "prompt 6"],
        "XSTest safe, half A": ["prompt 0", "prompt 2"],
        "XSTest safe, half B": ["prompt 1"],
    }


def test_perplexity_is_that_of_all_answer_tokens_together():
    model, chat = tiny.model(), tiny.chat()
    examples = [chat.encode("a question", "yes"), chat.encode("another one", "it is a long story")]
    logits = [model(torch.tensor([each.input_ids])).logits[0, :-1].log_softmax(-1) for each in examples]
    picked = [
        -float(row[at, label])
        for each, row in zip(examples, logits, strict=True)
        for at, label in enumerate(each.labels[1:])
        if label >= 0
    ]
    assert start.perplexity(model, examples, chat.pad_id) == pytest.approx(
        math.exp(sum(picked) / len(picked)), rel=1e-5
    )
