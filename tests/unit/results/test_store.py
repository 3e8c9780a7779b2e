"""Run folders: who is on a run, what became of it, and what a reader of the store sees."""

import json
import os
import signal
import subprocess
import sys
import time
from datetime import datetime

import pytest
from omegaconf import OmegaConf

from cwac_lab import results
from cwac_lab.core.errors import LabError
from cwac_lab.results import store
from cwac_lab.results.store import RunFolder
from cwac_lab.run.identity import run_key
from support import tiny

HOLD = """
import sys, time
from pathlib import Path
from cwac_lab.results.store import RunFolder
run = RunFolder(Path(sys.argv[1]))
with run.claim() as free, run.running():
    print(free, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that is on a run."""
    run = RunFolder(tmp_path / "runs" / "one")
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(run.path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "True\n"
    yield run, process
    process.kill()
    process.wait()


def test_a_run_belongs_to_one_process_until_that_dies(other):
    run, process = other
    assert run.status == "running"
    assert run.told()["pid"] == process.pid
    with run.claim() as free:
        assert not free
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert run.status == "interrupted"
    with run.claim() as free:
        assert free


def test_the_heart_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "HEARTBEAT_SECONDS", 0.05)
    run = RunFolder(tmp_path / "one")
    written = []
    monkeypatch.setattr(RunFolder, "mark", lambda self, status, reason=None: written.append(status))
    with run.running():
        time.sleep(0.3)
    assert written.count("running") >= 3
    assert written[-1] == "ok"


def test_how_a_run_ends(tmp_path):
    good, bad = RunFolder(tmp_path / "runs" / "good"), RunFolder(tmp_path / "runs" / "bad")
    with good.claim(), good.running():
        assert good.told()["status"] == "running"
    assert good.status == "ok"
    with pytest.raises(RuntimeError), bad.running():
        raise RuntimeError("out of\nluck")
    assert bad.status == "failed"
    assert bad.told()["reason"] == "RuntimeError: out of luck"
    assert datetime.fromisoformat(bad.told()["heartbeat"]).tzinfo is not None
    assert RunFolder(tmp_path / "runs" / "none").status == "new"


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_an_unreadable_status_is_one_line(text, tmp_path):
    run = RunFolder(tmp_path / "one")
    run.path.mkdir()
    (run.path / store.STATUS).write_text(text)
    with pytest.raises(LabError, match="remove the folder to run it again"):
        _ = run.status


def test_the_store_as_a_table(other, tmp_path):
    with RunFolder(tmp_path / "runs" / "two").running():
        rate = {"value": 12.5, "low": 5.0, "high": 20.0, "n": 40}
        facts = dict.fromkeys(store.FACTS, "x") | {"constraint": "weight", "seed": 3, "harmful_ratio": 0.2}
        metrics = {
            **{"schema": store.SCHEMA, **facts, "harmful_score": rate, "broken": False},
            **{"judges": {"refusal": {"version": "1"}}, "stages": {"train": {"seconds": 2.0, "peak_memory_gb": 1.0}}},
        }
        (tmp_path / "runs" / "two" / store.METRICS).write_text(json.dumps(metrics))
        (tmp_path / "runs" / "two" / store.CONFIG).write_text(json.dumps({"seed": 3, "sae": {"k": 8}}))
    with pytest.raises(MemoryError), RunFolder(tmp_path / "runs" / "three").running():
        raise MemoryError
    with RunFolder(tmp_path / "runs" / "zero").running():
        (tmp_path / "runs" / "zero" / store.METRICS).write_text("{}")
    frame = results.load(tmp_path).set_index("run")
    assert frame["status"].to_dict() == {"one": "running", "three": "failed", "two": "ok", "zero": "unreadable"}
    assert "schema 1, accepted: 2 | 3" in frame.loc["zero", "reason"]
    assert frame.loc["three", "reason"] == "MemoryError:"
    row = frame.loc["two"]
    assert (row["constraint"], row["seed"], row["harmful_score"], row["harmful_score_n"]) == ("weight", 3, 12.5, 40)
    assert row["seconds"] == 2.0
    assert row["sae.k"] == 8
    assert [run.path.name for run in results.select(tmp_path, "mine", "`sae.k` > 7")] == ["two"]


def test_a_folder_that_is_half_removed_is_not_under_its_name(tmp_path, monkeypatch):
    def killed(folder, **_):
        for file in folder.glob("a"):
            file.unlink()
            raise KeyboardInterrupt

    run, made = RunFolder(tmp_path), tmp_path / store.CHECKPOINT
    made.mkdir()
    for name in "ab":
        (made / name).write_text(name)
    with monkeypatch.context() as patch:
        patch.setattr(store.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            run.remove(made.name)
    assert not made.exists()
    made.mkdir()
    run.remove(made.name)
    assert list(tmp_path.iterdir()) == []


def test_the_key_of_a_run_ignores_what_changes_no_result():
    def key(*overrides, data="a"):
        return run_key(OmegaConf.to_container(tiny.config(*overrides), resolve=True), {"data": data})

    assert key() == key("logger=csv", "output_root=/elsewhere", "trainer.progress_bar=false", "force=true")
    levers = ("trainer.devices=2", "trainer.strategy=fsdp", "trainer.gradient_checkpointing=true")
    assert key() == key(*levers)
    assert key("harmful_ratio=0") == key("harmful_ratio=0.0")
    assert len({key(), key("tuning=lora"), key("tuning=qlora"), key("tuning=lora", "tuning.base=bfloat16")}) == 4
    assert len({key(), key(data="b"), key("seed=1"), key("task=agnews"), key("constraint.weight.energy=0.5")}) == 5
