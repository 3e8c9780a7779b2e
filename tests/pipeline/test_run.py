"""The whole way on a tiny model: compose, prepare, fine-tune, evaluate, record, judge again, tabulate."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cwac_lab import evaluate, tables, train
from cwac_lab.core.cache import read_json, read_jsonl
from cwac_lab.results import load
from support import tiny

CONSTRAINTS = ("none", "weight", "activation", "coupled")
RATES = ("harmful_score", "retained_refusals", "finetune_accuracy", "over_refusal", "over_refusal_lookalike")


@pytest.fixture(scope="module")
def output(tiny_folder, tmp_path_factory):
    where = tmp_path_factory.mktemp("output")
    shared = [*tiny.small_run(tiny_folder, where), tiny.BOTH_JUDGES]
    for constraint in CONSTRAINTS:
        tiny.launch(train.main, [*shared, f"constraint={constraint}", *extra(constraint)])
    tiny.launch(train.main, [*shared, "finetune=false"])
    return where


def extra(constraint):
    held = ["constraint.activation.n_latents=8", "constraint.activation.depths=[0.5]"]
    restored = ["constraint.weight.restore_every_n_steps=2"]
    return (held if constraint in ("activation", "coupled") else []) + (
        restored if constraint in ("weight", "coupled") else []
    )


def folder_of(output, method):
    (found,) = (output / "runs").glob(f"smollm-sst2-{method}-*")
    return found


@pytest.mark.parametrize("method", [*CONSTRAINTS, "start"])
def test_the_record_is_complete(output, method):
    folder = folder_of(output, method)
    metrics = read_json(folder / "metrics.json")
    assert read_json(folder / "status.json")["status"] == "ok"
    assert {"config.json", "provenance.json", "generations.jsonl", "verdicts.jsonl"} <= {
        f.name for f in folder.iterdir()
    }
    for rate in (*RATES, "incoherent"):
        assert set(metrics[rate]) == {"value", "low", "high", "n"}
    assert metrics["constraint"] == method
    assert metrics["finetune_accuracy"]["n"] == 4
    assert all(stage["seconds"] >= 0 and stage["peak_memory_gb"] > 0 for stage in metrics["stages"].values())
    assert "local folder" in metrics["weights"]
    provenance = read_json(folder / "provenance.json")
    assert {
        "packages",
        "git_commit",
        "git_dirty",
        "weights_content",
        "task_data_sha256",
        "pools_sha256",
        "seed",
    } <= set(provenance)
    kinds = [row["kind"] for row in read_jsonl(folder / "generations.jsonl")]
    assert {kind: kinds.count(kind) for kind in kinds} == {"harmful": 3, "harmless": 3, "lookalike": 3, "task": 4}


def test_what_the_start_answers_is_asked_once_and_is_what_a_run_of_it_answers(output):
    assert len(list((output / "cache" / "start_answers").iterdir())) == 1 + 1  # and a lock
    told = {}
    for method in (*CONSTRAINTS, "start"):
        rows = read_jsonl(folder_of(output, method) / "generations.jsonl")
        told[method] = [row["start_output"] for row in rows if row["kind"] == "harmful"]
        assert {row["kind"] for row in rows if "start_output" in row} == {"harmful"}
    own = [row["output"] for row in rows if row["kind"] == "harmful"]
    assert all(texts == own for texts in told.values())


def test_fewer_prompts_can_be_asked(tiny_folder, tmp_path):
    tiny.launch(train.main, [*tiny.small_run(tiny_folder, tmp_path), "finetune=false", "evaluation.n_prompts=2"])
    kinds = [row["kind"] for row in read_jsonl(folder_of(tmp_path, "start") / "generations.jsonl")]
    assert {kind: kinds.count(kind) for kind in kinds} == {"harmful": 2, "harmless": 2, "lookalike": 2, "task": 4}


@pytest.mark.parametrize("base", ["float32", "bfloat16"])
def test_a_run_with_adapters_ends_in_a_plain_model(tiny_folder, tmp_path, base, capsys):
    chosen = ["constraint=coupled", *extra("coupled"), "tuning=lora", "tuning.rank=2", f"tuning.base={base}"]
    tiny.launch(train.main, [*tiny.small_run(tiny_folder, tmp_path), *chosen, "trainer.export=true"])
    folder = folder_of(tmp_path, "coupled")
    metrics = read_json(folder / "metrics.json")
    assert metrics["leak"] < 1e-3
    found, start = (AutoModelForCausalLM.from_pretrained(where) for where in (folder / "model", tiny_folder))
    trained = sum(2 * sum(w.shape) for name, w in start.named_parameters() if "_proj.weight" in name)
    assert metrics["training"]["trained_parameters"] == trained
    held = start.to(getattr(torch, base)).float().state_dict()
    moved = [name for name, w in held.items() if not torch.equal(w, found.state_dict()[name])]
    assert moved
    assert f"LoRA of rank 2 in all_linear, beside weights in {base}" in capsys.readouterr().out
    assert all("_proj.weight" in name for name in moved)


def test_what_a_constraint_reports(output):
    metrics = {name: read_json(folder_of(output, name) / "metrics.json") for name in CONSTRAINTS}
    assert metrics["weight"]["leak"] < 1e-3
    assert metrics["coupled"]["leak"] < 1e-3
    assert "leak" not in metrics["none"]
    weight = metrics["weight"]["constraint_summary"]
    assert set(weight["rank"]) == set(weight["variance_kept"]) == {
        f"layers.{i}.{kind}" for i in range(2) for kind in ("attn_in", "attn_out", "ffn_in", "ffn_out")
    }  # fmt: skip
    layer = metrics["coupled"]["prepared"]["features"]["layer1"]
    assert {"fraction_variance_unexplained", "l0", "dead_share"} <= set(layer["quality"])
    assert len(layer["scores"]) == 8
    assert [int(i) for i in layer["scores"]] == metrics["coupled"]["constraint_summary"]["latents"]["1"]


def test_benign_prompts_can_be_protected_as_well(output, tiny_folder, tmp_path):
    more = ["constraint=weight", "constraint.weight.held_on=both"]
    tiny.launch(train.main, [*tiny.small_run(tiny_folder, tmp_path), *more])
    harmful, both = (
        read_json(folder_of(root, "weight") / "metrics.json")["constraint_summary"]["rank"]
        for root in (output, tmp_path)
    )
    assert all(both[site] >= rank for site, rank in harmful.items())
    assert sum(both.values()) > sum(harmful.values())


def test_steps_are_logged(output):
    import pandas as pd

    log = pd.read_csv(folder_of(output, "coupled") / "log" / "metrics.csv")
    assert {"loss/task", "loss/safety", "weight/removed"} <= set(log.columns)
    assert log["step"].max() == 3
    assert log.dropna(subset="weight/removed")["step"].tolist() == [1, 3]  # where it was done, not repeated in between


def test_the_manifest_shows_the_mixture(output):
    manifest = read_json(folder_of(output, "coupled") / "manifest.json")
    mixture, pools = manifest["mixture"], manifest["pools"]
    assert (mixture["n"], mixture["harmful"]) == (16, 3)
    assert sum(i in set(pools["harmful"]["finetune"]) for i in mixture["ids"]) == 3
    held = [i for pool in pools["harmful"].values() for i in pool]
    assert len(held) == len(set(held))


def test_plain_transformers_loads_the_export(output):
    folder = folder_of(output, "none") / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    start = tiny.model()
    assert tokenizer.chat_template == tiny.TEMPLATE
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters(), strict=True))


def test_a_finished_run_is_not_repeated(output, tiny_folder, capsys):
    before = (folder_of(output, "none") / "metrics.json").stat().st_mtime_ns
    tiny.launch(train.main, [*tiny.small_run(tiny_folder, output), "constraint=none"])
    assert "already done" in capsys.readouterr().out
    assert (folder_of(output, "none") / "metrics.json").stat().st_mtime_ns == before


def test_judging_again_needs_no_model(output):
    folder = folder_of(output, "start")
    rows = read_jsonl(folder / "generations.jsonl")
    before = read_json(folder / "metrics.json")
    for row in rows:
        if row["kind"] == "harmful":
            row["output"] = "I'm sorry, but I can't help with that."
    text = "".join(json.dumps(row) + "\n" for row in rows)
    original = (folder / "generations.jsonl").read_text()
    (folder / "generations.jsonl").write_text(text)
    tiny.launch(evaluate.main, [f"run={folder}"], "evaluate")
    after = read_json(folder / "metrics.json")
    (folder / "generations.jsonl").write_text(original)
    tiny.launch(evaluate.main, [f"run={folder}"], "evaluate")
    assert after["harmful_score"]["value"] == 0.0
    assert after["stages"] == before["stages"]
    assert read_json(folder / "metrics.json") == before


def test_a_second_judge_stands_beside_the_first(output):
    folder = folder_of(output, "none")
    told = read_json(folder / "metrics.json")["judges"]
    assert list(told) == ["refusal", "classifier"]
    assert set(told["classifier"]["agreement"]) == {"harmful", "harmless", "unparsable"}
    verdicts = read_jsonl(folder / "verdicts-classifier.jsonl")
    assert {row["judge"] for row in verdicts if row["kind"] != "task"} == {"classifier"}
    row = load(output).set_index("run").loc[folder.name]
    rate = told["classifier"]["harmful_score"]["value"]
    assert row["harmful_score_classifier"] == rate if rate is not None else row.isna()["harmful_score_classifier"]


def test_other_judges_are_asked_without_generating(output):
    folder = folder_of(output, "none")
    before = {name: (folder / name).read_bytes() for name in ("metrics.json", "verdicts.jsonl", "generations.jsonl")}
    tiny.launch(evaluate.main, [f"run={folder}", "judges=[classifier,refusal]"], "evaluate")
    first = {row["judge"] for row in read_jsonl(folder / "verdicts.jsonl") if row["kind"] != "task"}
    assert first == {"classifier"}
    tiny.launch(evaluate.main, [f"run={folder}"], "evaluate")
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_tables_read_the_store(output, capsys):
    tiny.launch(tables.main, [f"output_root={output}"], "tables")
    text = capsys.readouterr().out
    first, second = text.split("### Paired differences")
    rows, paired = ([line for line in part.splitlines() if line.startswith("| ")] for part in (first, second))
    assert len(rows) == 2 + len(CONSTRAINTS) + 1  # header, rule, start first
    assert " start " in rows[2]
    assert len(paired) == 2 + len(CONSTRAINTS) - 1  # plain fine-tuning is what the others are compared with
    assert (output / "tables" / "summary.csv").is_file()
    assert not (output / "figures").exists()  # random weights have no HS, and so no place on a trade-off


def test_a_failed_run_is_marked_with_its_reason(tiny_folder, tmp_path, capsys):
    shared = [*tiny.small_run(tiny_folder, tmp_path), "sae.min_explained_variance=2", *extra("coupled")]
    with pytest.raises(SystemExit) as stopped:
        tiny.launch(train.main, shared)
    assert stopped.value.code == 2
    assert "min_explained_variance" in capsys.readouterr().err
    status = read_json(folder_of(tmp_path, "coupled") / "status.json")
    assert status["status"] == "failed"
    assert "QualityError" in status["reason"]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_lack_of_memory_names_what_takes_less(tiny_folder, tmp_path, capsys, monkeypatch, error):
    def fit(*arguments, **settings):
        raise error

    monkeypatch.setattr("cwac_lab.run.stages.fit", fit)
    with pytest.raises(SystemExit) as stop:
        tiny.launch(train.main, [*tiny.small_run(tiny_folder, tmp_path), "constraint=none"])
    assert stop.value.code == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith("error: out of memory (")
    for lever in ("trainer.batch_size (4)", "accumulate", "gradient_checkpointing=true", "tuning=lora", "fsdp"):
        assert lever in line
    status = read_json(folder_of(tmp_path, "none") / "status.json")
    assert status["status"] == "failed"
    assert "out of memory" in status["reason"]


def test_pools_that_overlap_stop_the_run(tiny_folder, tmp_path, monkeypatch, capsys):
    from cwac_lab.data import pools

    def careless(plan, lists, *_):
        (rows,) = lists.values()
        return {pool: rows[: sum(parts.values())] for pool, parts in plan.items()}, {}

    monkeypatch.setattr(pools, "_deal", careless)
    with pytest.raises(SystemExit):
        tiny.launch(train.main, [*tiny.small_run(tiny_folder, tmp_path), "constraint=none"])
    error = capsys.readouterr().err
    assert "prompt harm" in error
    assert "is also" in error
