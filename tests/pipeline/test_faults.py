"""Sweeps that are killed, and several of them on one store: nothing is lost, nothing is done twice."""

import errno
import multiprocessing
import os
import random
import shutil
import time
from contextlib import suppress
from pathlib import Path

import pandas as pd
import pytest
from safetensors import SafetensorError

from cwac_lab import results, train
from cwac_lab.report import files
from cwac_lab.report.console import Screen
from cwac_lab.results.store import runs
from cwac_lab.run import identity, stages
from cwac_lab.sweep import runner
from cwac_lab.sweep.cells import Cells
from support import tiny

# Forked children start with everything imported, so that most of their short life is work.
FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def lively_folder(tmp_path_factory):
    """A model whose answers depend on what it was trained on."""
    folder = tmp_path_factory.mktemp("lively")
    tiny.lively("llama").save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def cells(folder, output, seeds, **changes):
    settings = [*tiny.small_run(folder, output), "profile=embedded", "data.n_test=2"]
    settings += [f"{key}={value}" for key, value in changes.items()]
    return [(*settings, f"constraint={name}", f"seed={seed}") for seed in range(seeds) for name in ("none", "l2")]


def sweep(wanted, trace=None):
    """Make what is missing; every run that is really carried out leaves a line in ``trace``."""
    if trace is not None:
        carried_out = stages.carry_through

        def noted(job):
            with trace.open("a") as stream:
                stream.write(f"{job.folder.path.name}\n")
            carried_out(job)

        stages.carry_through = noted
    output = next(key.partition("=")[2] for key in wanted[0] if key.startswith("output_root="))
    return list(runner.sweep(wanted, 1, Screen(quiet=True), lambda _: None, Cells(Path(output))))


def what_came_out(root):
    """Return tables, figures, and the answers of every run, byte for byte."""
    files.write(root, "all", list(runs(root)))
    made = [path for kind in ("tables", "figures") for path in (root / kind).iterdir()]
    made += (root / "runs").glob("*/generations.jsonl")
    found = {str(path.relative_to(root)): path.read_bytes() for path in made}
    table = pd.read_csv(root / "tables" / "all.csv")
    told = table.drop(columns=[name for name in table if name.startswith(("seconds", "train_seconds", "peak_"))])
    return found | {"tables/all.csv": told.to_csv().encode()}  # what a run took is never the same


def last_write(root):
    """Return when something was last written to a store's records, without touching their locks."""
    times = [0.0]
    for path in (root / "runs").rglob("*"):
        with suppress(FileNotFoundError):  # a temporary file
            times.append(path.stat().st_mtime)
    return max(times)


def finished(root):
    """Return how many runs of a store have their metrics."""
    return len(list((root / "runs").glob("*/metrics.json")))


@pytest.mark.slow
def test_a_sweep_that_is_killed_again_and_again_ends_with_the_same_table(lively_folder, tmp_path):
    settings = {"trainer.checkpoint_every_n_steps": 1, "trainer.learning_rate": 0.01, "evaluation.max_new_tokens": 6}
    whole, broken = (cells(lively_folder, tmp_path / name, 6, **settings) for name in ("whole", "broken"))
    begin = time.perf_counter()
    assert all(outcome.status == "ok" for outcome in sweep(whole))
    span = (time.perf_counter() - begin) / len(whole)
    for cell in broken:  # what every child would spend its life on is in memory when it is forked
        identity.identity(runner.composed(cell), print)
    source, unfinished, seen = random.Random(0), 0, set()
    for _ in range(6):
        child = FORK.Process(target=sweep, args=(broken,))
        begin, done = time.time(), finished(tmp_path / "broken")
        child.start()
        while child.is_alive() and last_write(tmp_path / "broken") < begin:
            child.join(0.01)
        # Somewhere in a run, or as one ends: however fast the machine is now, no child gets further.
        end = time.time() + span * source.uniform(0, 1.5)
        while child.is_alive() and time.time() < end and finished(tmp_path / "broken") == done:
            child.join(0.01)
        unfinished += child.is_alive()
        child.kill()
        child.join()
        seen |= {run.status for run in runs(tmp_path / "broken")}
    assert unfinished >= 3
    assert "interrupted" in seen
    final = sweep(broken)
    assert [(o.status, o.reason) for o in final if o.status != "ok"] == []
    found, expected = what_came_out(tmp_path / "broken"), what_came_out(tmp_path / "whole")
    assert found == expected
    answers = [text for name, text in expected.items() if name.endswith("jsonl")]
    assert len(set(answers)) > 9  # seeds and methods differ in what they say, so a wrong resume would show


@pytest.mark.exhaustive
def test_four_workers_on_one_store_do_every_cell_once(tiny_folder, tmp_path):
    wanted, trace = cells(tiny_folder, tmp_path, 4), tmp_path / "trace"
    workers = [FORK.Process(target=sweep, args=(wanted, trace)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    done = trace.read_text().split()
    assert len(done) == len(set(done)) == len(wanted) == 8
    assert results.load(tmp_path)["status"].tolist() == ["ok"] * 8
    begin = time.perf_counter()
    assert {outcome.status for outcome in sweep(wanted)} == {"ok"}
    print(f"a recorded cell is skipped in {(time.perf_counter() - begin) / len(wanted) * 1000:.0f} ms")


def test_a_full_disk_is_one_line_and_loses_no_record(tiny_folder, tmp_path, monkeypatch, capsys):
    shared = [*tiny.small_run(tiny_folder, tmp_path), "constraint=none"]
    tiny.launch(train.main, [*shared, "seed=0"])
    before = {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    real = os.fdopen

    def full(handle, *rest, **more):
        stream = real(handle, *rest, **more)
        if any((tmp_path / "runs").glob("*-s1-*/generations.jsonl")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return stream

    monkeypatch.setattr("cwac_lab.core.cache.os.fdopen", full)
    with pytest.raises(SystemExit) as stopped:
        tiny.launch(train.main, [*shared, "seed=1"])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: No space left on device: free some and run it again; what was recorded before in ")
    monkeypatch.undo()
    assert before == {path: path.read_bytes() for path in before}
    assert [run.status for run in runs(tmp_path)] == ["ok", "interrupted"]
    tiny.launch(train.main, [*shared, "seed=1"])
    assert [run.status for run in runs(tmp_path)] == ["ok", "ok"]


def test_a_disk_too_small_for_the_model_is_told_before_weights_are_loaded(tiny_folder, tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("cwac_lab.run.estimate.shutil.disk_usage", lambda _: usage._replace(free=20_000))
    monkeypatch.setattr("cwac_lab.run.start.load_model", lambda *_: pytest.fail("weights were loaded"))
    shared = [*tiny.small_run(tiny_folder, tmp_path), "constraint=none"]
    line = tiny.error_of(train.main, shared, capsys)
    needed = 4 * sum(parameter.numel() for parameter in tiny.model().parameters()) / 1e9
    assert needed > 2e-5
    assert line == (
        f"trainer.export=True: accepted: false, or {needed:.3g} GB free in output_root={tmp_path} (2e-05 GB are)"
    )
    kept = [*shared, "trainer.export=false", "trainer.checkpoint_every_n_steps=2"]
    assert tiny.error_of(train.main, kept, capsys).startswith("trainer.checkpoint_every_n_steps=2: accepted: 0, or ")
    monkeypatch.undo()
    assert [run.status for run in runs(tmp_path)] == []  # nothing was begun


def test_a_full_disk_under_the_weights_is_one_line(tiny_folder, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("cwac_lab.run.stages.export", full)
    with pytest.raises(SystemExit, match="2"):
        tiny.launch(train.main, [*tiny.small_run(tiny_folder, tmp_path), "constraint=none"])
    assert capsys.readouterr().err.startswith("error: No space left on device: free some and run it again;")


def test_other_trouble_with_weights_is_not_taken_for_a_full_disk(tiny_folder, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise SafetensorError("Error while deserializing header: header too large")

    monkeypatch.setattr("cwac_lab.run.stages.export", broken)
    with pytest.raises(SafetensorError, match="header too large"):
        tiny.launch(train.main, [*tiny.small_run(tiny_folder, tmp_path), "constraint=none"])
