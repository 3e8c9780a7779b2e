"""What Weights & Biases is told, offline: of runs in one process, and of a store."""

import json
import os
import shutil
import struct
import time

import pytest
import wandb
from wandb.proto.wandb_internal_pb2 import Record

from cwac_lab import train
from cwac_lab.core.cache import read_jsonl
from cwac_lab.core.errors import MissingAsset
from cwac_lab.report import __main__ as report
from cwac_lab.report import tracking
from cwac_lab.report.tracking import log_run, log_store
from cwac_lab.results.store import RunFolder
from cwac_lab.training import loop
from support import tiny

pytestmark = pytest.mark.slow

BLOCK, FULL, LAST = 32768, 1, 4


def pieces(data):
    """Yield the messages of a ``.wandb`` file: LevelDB's log format after seven bytes of its own."""
    at, message = 7, b""
    while at < len(data):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        message += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (FULL, LAST):
            yield message
            message = b""


def told(folder):
    """Return the folder of the one run that was tracked under a folder, its summary, and the exit codes it was told."""
    (tracked,) = (folder / "wandb").glob("offline-run-*")
    (file,) = tracked.glob("*.wandb")
    end = time.monotonic() + 10
    while not (found := read(file))[1] and time.monotonic() < end:  # it is written by a process of its own
        time.sleep(0.1)
    return tracked, *found


def read(file):
    """Return the summary in a ``.wandb`` file, and the exit codes."""
    summary, exits = {}, []
    for message in pieces(file.read_bytes()):
        record = Record()
        record.ParseFromString(message)
        kind = record.WhichOneof("record_type")
        if kind == "summary":
            for item in record.summary.update:
                summary[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
        if kind == "exit":
            exits.append(record.exit.exit_code)
    return summary, exits


@pytest.fixture(scope="module")
def root(tiny_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("tracked")
    shared = [*tiny.small_run(tiny_folder, root), "logger.wandb=offline", "constraint=none", tiny.BOTH_JUDGES]
    tiny.launch(train.main, [*shared, "diagnostics.enabled=true"])
    tiny.launch(train.main, [*shared, "constraint=l2"])
    tiny.launch(train.main, [*shared, "constraint=l2", "constraint.l2.strength=1"])
    tiny.launch(train.main, [*shared, "finetune=false"])
    return root


def test_every_run_of_a_process_is_a_run_of_its_own(root):
    found = {folder.name: told(folder) for folder in (root / "runs").iterdir()}
    assert len(found) == 4
    assert len({tracked.name for tracked, _, _ in found.values()}) == 4
    assert all(exits == [0] for _, _, exits in found.values())
    assert wandb.run is None


def test_rates_verdicts_and_drift_are_told_without_texts(root):
    (folder,) = (root / "runs").glob("*-none-*-s0-*")
    tracked, summary, _ = told(folder)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert summary["harmful_score.value"] == metrics["harmful_score"]["value"]
    assert summary["finetune_accuracy.n"] == metrics["finetune_accuracy"]["n"]
    (table,) = (tracked / "files/media/table").glob("verdicts_*")
    verdicts = json.loads(table.read_text())
    assert {"kind", "id", "refusal", "classifier", "task"} == set(verdicts["columns"])
    generations = read_jsonl(folder / "generations.jsonl")
    assert len(verdicts["data"]) == len(generations)
    assert list((tracked / "files/media/images").glob("drift_*.png"))
    (binary,) = tracked.glob("*.wandb")
    files = [file.read_bytes() for file in tracked.rglob("*") if file.is_file() and file != binary]
    sent = b"".join([*files, *pieces(binary.read_bytes())])
    for text in {row[part] for row in generations for part in ("prompt", "output") if len(row[part]) > 9}:
        assert not any(form.encode() in sent for form in (text, json.dumps(text)[1:-1]))


def test_a_failed_run_ends_as_failed(tmp_path):
    def fail():
        with loop.loggers(loop.LoggerConfig(wandb="offline"), tmp_path, "failing", {}) as made:
            made[1].log_metrics({"loss": 1.0})
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fail()
    assert told(tmp_path)[2] == [1]


def test_a_run_is_begun_under_its_name_project_and_settings(tmp_path, monkeypatch):
    wandb.teardown()
    monkeypatch.setenv("WANDB_RUN_ID", "chosen1")  # which is to be gone on with, online
    try:
        with loop.loggers(loop.LoggerConfig("offline", "mine"), tmp_path, "named", {"seed": 3}) as made:
            begun = made[1].experiment
            told = (begun.name, begun.project, begun.id, dict(begun.config), begun.settings.resume)
        assert told == ("named", "mine", "chosen1", {"seed": 3}, "allow")
    finally:
        wandb.teardown()


def test_a_run_that_the_caller_has_begun_is_left_open(root, tmp_path):
    with wandb.init(mode="offline", dir=str(tmp_path)) as outer:
        with loop.loggers(loop.LoggerConfig(wandb="offline"), tmp_path, "inner", {}) as made:
            made[1].log_metrics({"loss": 1.0})
        assert wandb.run is outer
        shutil.copytree(root / "runs", tmp_path / "store" / "runs")
        log_store(tmp_path / "store", "elsewhere", offline=True)
        assert wandb.run is outer
        outer.log({"loss": 2.0})


def test_an_offline_run_is_offline_where_the_process_was_online(tmp_path, monkeypatch):
    wandb.teardown()
    monkeypatch.setenv("WANDB_MODE", "online")
    try:
        assert wandb.setup().settings.mode == "online"
        with loop.loggers(loop.LoggerConfig(wandb="offline"), tmp_path, "private", {}) as made:
            assert made[1].experiment.settings.mode == "offline"
        assert os.environ["WANDB_MODE"] == "online"
    finally:
        wandb.teardown()


def test_a_tracker_that_fails_fails_no_run(root, tmp_path, monkeypatch):
    (folder,) = (root / "runs").glob("*-none-*-s0-*")
    heard = []
    monkeypatch.setattr(tracking, "_media", lambda _: 1 / 0)
    with loop.loggers(loop.LoggerConfig(wandb="offline"), tmp_path, "poor", {}) as made:
        log_run(made, RunFolder(folder), heard.append)
    assert heard == ["not told to wandb: ZeroDivisionError: division by zero"]


def test_a_store_without_runs_makes_no_run(tmp_path):
    with pytest.raises(MissingAsset, match="no finished runs"):
        log_store(tmp_path, "none", offline=True)
    assert not (tmp_path / "report").exists()


def test_the_tables_and_figures_of_a_store_are_told(root, capsys):
    tiny.launch(report.main, [f"output_root={root}", "wandb=offline"], "report")
    assert "tables and figures: wandb, offline, project cwac-lab" in capsys.readouterr().out
    tracked, _, exits = told(root / "report")
    media = [file.name.rsplit("_", 2)[0] for file in (tracked / "files/media").rglob("*") if file.is_file()]
    assert {"rates", "differences"} <= set(media)
    assert [name for name in media if "over-l2" in name]
    (rates,) = (tracked / "files/media/table").glob("rates_*")
    assert not [row for row in json.loads(rates.read_text())["data"] if None in row or "NaN" in row]
    assert exits == [0]


def test_an_unknown_choice_is_one_line(root, capsys):
    with pytest.raises(SystemExit):
        tiny.launch(report.main, [f"output_root={root}", "wandb=yes"], "report")
    assert "error: wandb=yes: accepted: " in capsys.readouterr().err
