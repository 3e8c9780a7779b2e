"""Drift of whole runs: within a run, of finished runs, and between two folders."""

import copy
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch

from cwac_lab import diagnose, train
from cwac_lab.core.cache import read_json, read_jsonl, write_json
from cwac_lab.diagnostics import evidence
from cwac_lab.run.drift import Measurer
from support import tiny

pytestmark = pytest.mark.slow

SHARED = (
    # of one prompt, so that directions are free at the default energy
    *("sae.n_latents=128", "constraint=weight", "data.harmful.reference.requests=1"),
    *("trainer.epochs=2", "trainer.learning_rate=1e-3"),
)


@pytest.fixture(scope="module")
def output(tiny_folder, tmp_path_factory):
    """A run without measurement, and the same one measured, in stores of their own."""
    where = tmp_path_factory.mktemp("output")
    shared = [*tiny.small_run(tiny_folder, where / "plain"), *SHARED]
    tiny.launch(train.main, shared)
    measured = [f"output_root={where / 'measured'}", "diagnostics.enabled=true", "diagnostics.every_n_steps=3"]
    tiny.launch(train.main, [*shared, *measured])
    return where


def folder(output, name):
    (found,) = (output / name / "runs").iterdir()
    return found


def test_measuring_changes_nothing_that_a_run_computes(output):
    plain, measured = folder(output, "plain"), folder(output, "measured")
    assert plain.name == measured.name
    assert read_jsonl(plain / "generations.jsonl") == read_jsonl(measured / "generations.jsonl")
    for name in ("model.safetensors", "config.json"):
        assert (plain / "model" / name).read_bytes() == (measured / "model" / name).read_bytes()
    assert not (plain / "drift.json").exists()


def test_drift_is_sampled_and_logged(output):
    found = read_json(folder(output, "measured") / "drift.json")
    sampled = read_json(folder(output, "measured") / "drift_samples.json")
    assert [sample["step"] for sample in sampled["samples"]] == [3, 6, 8]
    assert sampled["samples"][-1] == {"step": 8, **found["summary"]}  # the last step is measured once
    assert list(found["measured_in"]) == list(sampled["measured_in"]) == ["subspace"]
    assert found["prompts"] == {"harmful": 3, "benign": 3}
    assert sampled["samples"][0]["harmful"]["weight"] > 0
    assert found["summary"]["harmful"]["leak"] < 1e-5
    log = pd.read_csv(folder(output, "measured") / "log" / "metrics.csv")
    assert log["drift/harmful/weight"].notna().sum() == 2  # a step without a sample repeats none


def test_a_finished_run_is_measured_as_it_would_have_been_within(output, capsys, monkeypatch):
    within = read_json(folder(output, "measured") / "drift.json")
    tiny.launch(diagnose.main, [f"output_root={output / 'plain'}", "measured_in=weight"], "diagnose")
    after = read_json(folder(output, "plain") / "drift.json")
    for kind in ("harmful", "benign"):
        assert after["summary"][kind].pop("bound") > after["summary"][kind]["total"]
        assert after["summary"][kind] == pytest.approx(within["summary"][kind], rel=1e-4, abs=1e-6)
    assert "1 runs of" in capsys.readouterr().out
    tiny.launch(diagnose.main, [f"output_root={output / 'plain'}"], "diagnose")
    assert "0 runs of" in capsys.readouterr().out
    stores = [output / "plain", output / "measured"]
    told, correlations = [], evidence.correlations
    monkeypatch.setattr(evidence, "correlations", lambda frame: (told.append(frame["run"]), correlations(frame))[1])
    tiny.launch(diagnose.main, [f"output_root=[{','.join(map(str, stores))}]"], "diagnose")
    assert f"0 runs of {stores[0]}, {stores[1]}" in capsys.readouterr().out.replace("\n", " ")
    assert len(told[0]) == 2


def test_latents_and_reconstruction_are_told_too(output, capsys):
    run = folder(output, "measured")
    tiny.launch(diagnose.main, [f"run={run}"], "diagnose")
    found = read_json(run / "drift.json")
    assert found["latents"]["harmful"][0]["chosen"] > 0
    assert set(found["reconstruction"]["1"]["benign"]) == {"start", "now"}
    assert list(found["measured_in"]) == ["subspace", "features"]
    assert len(read_json(run / "drift_samples.json")["samples"]) == 3  # of the run itself, kept
    assert "explained variance, autoencoder" in capsys.readouterr().out


def test_runs_that_start_alike_share_a_probe_and_others_do_not(tmp_path, monkeypatch, capsys):
    for place, (name, seeds) in enumerate({"one": "0,1", "two": "0", "replaced": "0"}.items()):
        shared = tiny.small_run(tiny.save(tmp_path / name, seed=place), tmp_path / "output")
        for seed in seeds.split(","):
            forms = "varied" if seed == "1" else "own"  # which makes no difference to how drift is told
            tiny.launch(train.main, [*shared, *SHARED, f"seed={seed}", f"forms={forms}"])
    tiny.save(tmp_path / "replaced", seed=9)  # no longer what its run started from
    of_start, built = Measurer._of_start, []

    def counted(self, run, begin):
        built.append(run.model.path)
        return of_start(self, run, begin)

    monkeypatch.setattr(Measurer, "_of_start", counted)
    tiny.launch(diagnose.main, [f"output_root={tmp_path / 'output'}", "measured_in=weight"], "diagnose")
    assert sorted(Path(path).name for path in built) == ["one", "two"]
    assert capsys.readouterr().out.count("left out: ") == 1
    told = [read_json(path)["measured_in"]["subspace"] for path in (tmp_path / "output" / "runs").glob("*/drift.json")]
    assert (len(told), len(set(told))) == (3, 2)


def test_two_folders_are_compared(output, tiny_folder, capsys):
    asked = [f"before={tiny_folder}", f"after={folder(output, 'plain') / 'model'}", "measured_in=none", "n_prompts=4"]
    tiny.launch(diagnose.main, asked, "diagnose")
    assert "harmful (n=4)" in capsys.readouterr().out


def changed(folder, **changes):
    """Save a model of another shape, or with another tokenizer, and return its folder."""
    tokens, drop = changes.pop("tokenizer", tiny.tokenizer()), changes.pop("drop", ())
    architecture = changes.pop("architecture", "llama")
    tiny.model(architecture, 3, **changes).save_pretrained(folder)
    if tokens is not None:
        tokens.save_pretrained(folder)
    for name in drop:
        (folder / name).unlink()
    return folder


def with_tokens(*more, first=False):
    """Return the tokenizer with further tokens, at the end or among the first."""
    found = copy.deepcopy(tiny.tokenizer())
    if first:  # the letters of its alphabet change places
        state = json.loads(found.backend_tokenizer.to_str())
        vocabulary = state["model"]["vocab"]
        vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
        found._tokenizer = type(found.backend_tokenizer).from_str(json.dumps(state))
    found.add_tokens(list(more))
    return found


# Other than the start, and what is said of the two before weights are loaded.
UNLIKE = {
    "layers": ({"num_hidden_layers": 3}, "num_hidden_layers=2, not 3"),
    "width": ({"hidden_size": 64, "head_dim": 16}, "hidden_size=32, not 64"),
    "inner width": ({"intermediate_size": 64}, "intermediate_size=48, not 64"),
    "heads": ({"num_key_value_heads": 4}, "num_key_value_heads=2, not 4"),
    "architecture": ({"architecture": "qwen2"}, "model_type=llama, not qwen2"),
    "tokens moved": ({"tokenizer": with_tokens(first=True)}, "'A' is "),
    "fewer tokens": ({"vocab_size": 300}, "an embedding of all "),
}


@pytest.mark.parametrize("case", UNLIKE)
def test_models_that_are_no_states_of_one_are_one_line(case, tiny_folder, tmp_path, capsys, monkeypatch):
    changes, line = UNLIKE[case]
    after = changed(tmp_path / "after", **changes)
    for where in ("cwac_lab.run.start.load_model", "cwac_lab.run.drift.load_model"):
        monkeypatch.setattr(where, lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(SystemExit) as stopped:
        tiny.launch(diagnose.main, [f"before={tiny_folder}", f"after={after}", "measured_in=none"], "diagnose")
    assert stopped.value.code == 2
    (found,) = capsys.readouterr().err.strip().splitlines()
    assert found.startswith(f"error: after={after}: accepted: ")
    assert line in found


# Of another vocabulary or without a tokenizer: what is compared all the same, and what is said.
ALIKE = {
    "more rows": ({"vocab_size": 512}, "no KL of first tokens: it needs one vocabulary, these have 384 and 512 rows"),
    "more tokens": ({"vocab_size": 400, "tokenizer": with_tokens("<extra>")}, "these have 384 and 400 rows"),
    "no tokenizer": ({"tokenizer": None}, "has no tokenizer: its tokens are taken to be those of"),
}


@pytest.mark.parametrize("case", ALIKE)
def test_what_can_be_compared_is_and_the_rest_is_named(case, tiny_folder, tmp_path, capsys):
    changes, words = ALIKE[case]
    after = changed(tmp_path / "after", **changes)
    asked = [f"before={tiny_folder}", f"after={after}", "measured_in=weight", "n_prompts=4"]
    tiny.launch(diagnose.main, [*asked, "overrides=['data.reference=all']"], "diagnose")
    out = capsys.readouterr().out
    assert words in " ".join(out.split())
    for row in ("||dW h0||", "||W0 dh||", "bound of it", "leak", "cosine of the refusal"):
        assert row in out
    assert ("KL at the first tokens" in out) is (case == "no tokenizer")


def test_one_folder_twice_has_not_moved_and_that_is_told(tiny_folder, capsys):
    asked = [f"before={tiny_folder}", f"after={tiny_folder}/.", "measured_in=none", "n_prompts=4"]
    tiny.launch(diagnose.main, asked, "diagnose")
    out = capsys.readouterr().out
    assert "before and after are one folder" in out
    (row,) = [line for line in out.splitlines() if "||dW h0||" in line]
    assert [cell.strip() for cell in row.split("│")[2:4]] == ["0", "0"]


@pytest.mark.parametrize(("text", "said"), [("{", "Expecting"), ("[]", "no mapping")])
def test_a_broken_configuration_is_one_line(text, said, tiny_folder, tmp_path, capsys):
    shutil.copytree(tiny_folder, tmp_path / "after")
    (tmp_path / "after" / "config.json").write_text(text)
    with pytest.raises(SystemExit, match="2"):
        tiny.launch(diagnose.main, [f"before={tiny_folder}", f"after={tmp_path / 'after'}"], "diagnose")
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(
        f"error: after={tmp_path / 'after'}: accepted: a folder that transformers loads a model from"
    )
    assert said in line


def test_a_model_without_numbers_is_one_line(tiny_folder, tmp_path, capsys):
    model = tiny.model(seed=3)
    with torch.no_grad():
        model.get_decoder().layers[0].mlp.up_proj.weight.fill_(float("nan"))
    model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        tiny.launch(diagnose.main, [f"before={tiny_folder}", f"after={tmp_path}", "measured_in=none"], "diagnose")
    assert "its weights give no finite logits" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        (["run=nowhere"], "error: run=nowhere: accepted: a finished run with model/ (trainer.export=true)"),
        (["before=nowhere"], "error: before=nowhere: accepted: a folder that transformers loads a model from"),
    ],
)
def test_bad_input_is_one_line(asked, line, capsys):
    with pytest.raises(SystemExit) as stopped:
        tiny.launch(diagnose.main, asked, "diagnose")
    assert stopped.value.code == 2
    assert capsys.readouterr().err.strip() == line


def test_a_run_that_cannot_be_measured_does_not_stop_the_others(output, tmp_path, capsys):
    for name in ("a", "b"):
        shutil.copytree(folder(output, "plain"), tmp_path / "runs" / name)
        (tmp_path / "runs" / name / "drift.json").unlink(missing_ok=True)
    told = read_json(tmp_path / "runs" / "a" / "metrics.json")
    write_json(tmp_path / "runs" / "a" / "metrics.json", {**told, "weights_content": "of another start"})
    tiny.launch(diagnose.main, [f"output_root={tmp_path}", "measured_in=none"], "diagnose")
    assert "left out: a: the start here has the weights" in capsys.readouterr().out
    assert [(tmp_path / "runs" / name / "drift.json").exists() for name in ("a", "b")] == [False, True]


@pytest.mark.parametrize("setting", ["trainer.precision=bf16-true", "tuning.base=bfloat16"])
def test_drift_is_not_measured_across_precisions(setting, capsys):
    with pytest.raises(SystemExit):
        tiny.launch(train.main, ["tuning=lora", "constraint=none", setting, "diagnostics.enabled=true"])
    assert f"error: {setting}: accepted: float32 weights with diagnostics.enabled=true" in capsys.readouterr().err


def test_a_sharded_model_is_not_measured_while_it_trains(tmp_path, capsys):
    with pytest.raises(SystemExit):
        tiny.launch(train.main, ["trainer.devices=2", "trainer.strategy=fsdp", "diagnostics.enabled=true"])
    assert "diagnostics.enabled=True: accepted: false with trainer.strategy=fsdp" in capsys.readouterr().err
