"""Several processes on one machine (gloo): every defence ends where one process does."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pandas as pd
import pytest
from lightning.pytorch.loggers import CSVLogger
from safetensors import safe_open
from safetensors.torch import load_file

from cwac_lab import train
from cwac_lab.config.run import read
from cwac_lab.core import distributed
from cwac_lab.core.cache import read_json, read_jsonl
from cwac_lab.core.errors import LabError
from support import spmd, tiny
from support.defenses import ACTIVE
from support.held import assert_moved_alike, weights

STRATEGIES = ("ddp", "fsdp")


def together(modes, folder):
    """Let two forked processes do something under either strategy."""
    for strategy in STRATEGIES:
        (folder / strategy).mkdir()
    spmd.fork(modes, STRATEGIES, folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """What two processes leave."""
    return together(["few", "logged", "asked"], tmp_path_factory.mktemp("together"))


@pytest.fixture(params=STRATEGIES)
def folder(request, folders):
    return folders / request.param


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What they leave of every defence."""
    return together(["table"], tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """What they leave of runs that were stopped."""
    return together(["resume"], tmp_path_factory.mktemp("stopped"))


alone = cache(spmd.trained)


def of(table):
    return [(strategy, name, tuning) for strategy, chosen in table.items() for name, tuning in chosen]


def ends_where_one_does(folder, name, tuning):
    expected, summary = alone(name, tuning)
    file = folder / f"{name}-{tuning}.safetensors"
    assert_moved_alike(load_file(file), expected, weights(tiny.model()))
    with safe_open(file, "pt") as stored:
        leak = float(stored.metadata()["leak"])
    assert leak == pytest.approx(summary.get("leak", 0.0), rel=0.3, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "name", "tuning"), of(spmd.FEW))
def test_two_processes_end_where_one_does(strategy, name, tuning, folders):
    ends_where_one_does(folders / strategy, name, tuning)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("strategy", "name", "tuning"), of(spmd.TABLE))
def test_two_processes_end_where_one_does_under_every_defence(strategy, name, tuning, whole):
    ends_where_one_does(whole / strategy, name, tuning)


@pytest.mark.parametrize("name", ACTIVE)
def test_what_cannot_be_sharded_says_so(name):
    assert ACTIVE[name]().shardable is (name in spmd.SHARDABLE)


@pytest.mark.slow
def test_accumulation_and_checkpointing_within_them(folder):
    expected, _ = spmd.trained("coupled", "full", accumulate=2)
    assert_moved_alike(load_file(folder / "levers.safetensors"), expected, weights(tiny.model()))


@pytest.mark.slow
def test_what_two_processes_log_is_what_one_does(folder):
    spmd.watched([CSVLogger(folder, name="", version="alone")])
    found, expected = (pd.read_csv(folder / version / "metrics.csv") for version in ("together", "alone"))
    assert {"loss/task", "loss/proximal", "weight/removed", "weight/leak"} < set(expected)
    pd.testing.assert_frame_equal(found[list(expected)], expected, rtol=0.02, atol=1e-5)


@pytest.mark.slow
def test_what_the_start_answers_is_asked_by_both_and_kept(folder, tmp_path):
    found, expected = read_json(folder / "start_answers.json"), spmd.start_answered(tmp_path)
    assert found == expected
    assert len(set(found["given"][0])) > 1
    assert len(found["said"]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_checkpoint_of_two_processes_is_gone_on_with_by_two_or_one(strategy, stopped):
    folder = stopped / strategy
    for name in spmd.RESUMED:
        expected, _ = alone(name, "full", **spmd.LONG)
        assert_moved_alike(load_file(folder / f"{name}.safetensors"), expected, weights(tiny.model()))
        left = folder / f"{name}-there"
        parts = 2 if folder.name == "fsdp" else 1
        assert len(list(left.glob("weights-*-of-00002.safetensors"))) == parts
        by_one, _ = spmd.trained(name, "full", **spmd.LONG, checkpoint=left)
        assert_moved_alike(by_one, expected, weights(tiny.model()))


@pytest.mark.exhaustive
def test_a_lost_process_ends_the_others(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    with pytest.raises(LabError, match="process 1 of 2 was ended by SIGKILL, so the others were; the same command"):
        distributed.launch(2, "support.spmd", ["lose", "fsdp", str(tmp_path)])


@pytest.mark.parametrize(
    ("chosen", "line"),
    [
        (["trainer.devices=4096", "trainer.batch_size=4096"], "trainer.devices=4096: accepted: at most"),
        (["trainer.strategy=fsdp"], "trainer.strategy=fsdp: accepted: ddp with trainer.devices=1"),
    ],
)
def test_what_this_machine_has_not_is_one_line(chosen, line, capsys, tmp_path):
    """A record's configuration, made elsewhere, can be read nevertheless."""
    assert read(tiny.config(*chosen)).trainer.devices
    with pytest.raises(SystemExit) as stop:
        tiny.launch(train.main, [*chosen, f"output_root={tmp_path}"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {line}")
    assert not (tmp_path / "cache").exists()


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two processes need two cores")
@pytest.mark.exhaustive
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_on_two_devices_is_the_same_run(strategy, tmp_path, capsys):
    """Prepared, trained and evaluated by two processes; then one process finds it done, and repeats it alike."""
    model = tiny.save(tmp_path / "model")
    chosen = ["constraint=coupled", "constraint.activation.n_latents=8", "constraint.activation.depths=[0.5]"]
    arguments = [*tiny.small_run(model, tmp_path), *chosen]
    command = [sys.executable, "-m", "cwac_lab.train", *arguments, "trainer.devices=2", f"trainer.strategy={strategy}"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True)
    assert shown.stdout.count("fine-tuning on 16 rows") == 1
    (folder,) = (tmp_path / "runs").iterdir()
    together = read_json(folder / "metrics.json"), read_jsonl(folder / "generations.jsonl")
    tiny.launch(train.main, arguments)
    assert f"already done: {folder}" in capsys.readouterr().out.replace("\n", "")
    tiny.launch(train.main, [*arguments, "force=true"])
    metrics, generations = read_json(folder / "metrics.json"), read_jsonl(folder / "generations.jsonl")
    assert generations == together[1]
    volatile = {"stages", "leak", "constraint_summary"}
    assert {k: v for k, v in metrics.items() if k not in volatile} == {
        k: v for k, v in together[0].items() if k not in volatile
    }
    assert together[0]["leak"] < 1e-3
