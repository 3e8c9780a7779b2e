"""Folders that cannot be written to: one line, before anything is computed."""

import errno
import os
import tempfile
import threading
from pathlib import Path

import pytest
from safetensors import SafetensorError

from cwac_lab import diagnose, tables, train
from cwac_lab.core import outputs
from cwac_lab.core.errors import LabError
from cwac_lab.report import __main__ as report
from cwac_lab.results import load, store
from cwac_lab.results.store import RunFolder, runs
from support import tiny
from support.cover import some, table

ERRNOS = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE)


@pytest.fixture
def no_weights(monkeypatch):
    """Whoever loads weights has found out too late."""
    monkeypatch.setattr("cwac_lab.run.start.load_model", lambda *_, **__: pytest.fail("weights were loaded"))


def in_the_way(root):
    root.write_text("not a folder")
    return root


def below_a_file(root):
    return in_the_way(root) / "out"


def dangling(root):
    root.symlink_to(root.with_name("nowhere"))
    return root


def looping(root):
    root.symlink_to(root)
    return root


def too_long(root):
    return root / ("x" * 300)


def runs_is_a_file(root):
    root.mkdir()
    in_the_way(root / "runs")
    return root


# What is in the way of a folder, and what the line says of it.
OBSTACLES = {
    in_the_way: "a file is in its place: ",
    below_a_file: "Not a directory: ",
    dangling: "a link that leads nowhere is in its place: ",
    looping: "a link that leads nowhere is in its place: ",
    too_long: "File name too long: ",
}


@table(obstacle=OBSTACLES, key=["output_root", "cache_root"])
def test_what_is_in_the_way_is_named(key, obstacle, tiny_folder, tmp_path, capsys, no_weights):
    root = obstacle(tmp_path / "stands")
    shared = [*tiny.small_run(tiny_folder, tmp_path / "fine"), "constraint=none", f"{key}={root}"]
    line = tiny.error_of(train.main, shared, capsys)
    assert line.startswith(f"{key}={root}: accepted: a folder that can be made and written to ({OBSTACLES[obstacle]}")


def test_a_file_in_place_of_the_runs_is_named(tiny_folder, tmp_path, capsys, no_weights):
    root = runs_is_a_file(tmp_path / "stands")
    line = tiny.error_of(train.main, [*tiny.small_run(tiny_folder, root), "constraint=none"], capsys)
    accepted = "a folder that can be made and written to"
    assert line == f"output_root={root}: accepted: {accepted} (a file is in its place: {root}/runs)"


@pytest.fixture
def mounted(monkeypatch):
    """Folders below which nothing can be made or written, as the system says it; the tests' user may write anywhere."""
    held = {}

    def guard(owner, name, path_of):
        real = getattr(owner, name)

        def guarded(*given, **more):
            path = str(path_of(*given, **more))
            for root, code in held.items():
                if Path(path).is_relative_to(root) and not (name == "mkdir" and Path(path).is_dir()):
                    raise OSError(code, os.strerror(code), path)
            return real(*given, **more)

        monkeypatch.setattr(owner, name, guarded)

    guard(os, "mkdir", lambda path, *_, **__: path)
    guard(tempfile, "NamedTemporaryFile", lambda *_, **more: more.get("dir", "/"))
    guard(tempfile, "mkstemp", lambda *_, **more: more.get("dir", "/"))
    guard(tempfile, "mkdtemp", lambda *_, **more: more.get("dir", "/") or "/")
    return held


@table(code=ERRNOS, key=["output_root", "cache_root"], there=[True, False])
def test_what_cannot_be_written_is_named(code, key, there, tiny_folder, tmp_path, capsys, no_weights, mounted):
    root = tmp_path / "mounted"
    root.mkdir()
    root = root if there else root / "out"
    mounted[tmp_path / "mounted"] = code
    shared = [*tiny.small_run(tiny_folder, tmp_path / "fine"), "constraint=weight", f"{key}={root}"]
    line = tiny.error_of(train.main, shared, capsys)
    said = f"a folder that can be made and written to ({os.strerror(code)}: {root}"
    assert line.startswith(f"{key}={root}: accepted: {said}")


def test_a_cache_that_can_only_be_read_is_used(tiny_folder, tmp_path, capsys, mounted):
    """What is there is taken; what is not, cannot be made, and that is one line too."""
    shared = [*tiny.small_run(tiny_folder, tmp_path / "out"), "constraint=weight", f"cache_root={tmp_path / 'cache'}"]
    tiny.launch(train.main, [*shared, "seed=0"])
    mounted[tmp_path / "cache"] = errno.EROFS
    tiny.launch(train.main, [*shared, "seed=1"])
    assert "what is in the cache is used, nothing can be added" in capsys.readouterr().out
    assert [run.status for run in runs(tmp_path / "out")] == ["ok", "ok"]
    line = tiny.error_of(train.main, [*shared, "constraint.weight.energy=0.5"], capsys)
    assert line.startswith(f"Read-only file system: {tmp_path / 'cache'}")
    assert f"(cache_root={tmp_path / 'cache'})" in line


@pytest.mark.parametrize(
    ("setting", "name"),
    [("output_root={}/out", "{}/out/sweeps"), ("hydra.sweep.dir={}/sweep", "{}/sweep"), ("hydra.run.dir={}/run", "")],
)
def test_folders_that_hydra_makes_are_named(setting, name, tiny_folder, tmp_path, capsys, no_weights):
    file = in_the_way(tmp_path / "stands")
    shared = [*tiny.small_run(tiny_folder, tmp_path / "fine"), "constraint=none", setting.format(file)]
    line = tiny.error_of(train.main, [*(["-m", "seed=0,1"] if name else []), *shared], capsys)
    assert line.startswith(f"Not a directory: {name.format(file)}")
    assert "hydra.sweep.dir" in line


def test_no_place_for_temporary_files(monkeypatch, capsys):
    def none(*_, **__):
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr("cwac_lab.core.cli.tempfile.TemporaryDirectory", none)
    assert tiny.error_of(train.main, [], capsys) == "TMPDIR: No usable temporary directory found in ['/tmp']"


@pytest.mark.parametrize("main", [(tables.main, "tables"), (report.main, "report")])
def test_tables_and_page_say_where_they_cannot_be_written(main, tiny_folder, tmp_path, capsys, mounted):
    (tmp_path / "runs").mkdir()
    mounted[tmp_path] = errno.EROFS
    line = tiny.error_of(main[0], [f"output_root={tmp_path}"], capsys, main[1])
    assert line.startswith(f"output_root={tmp_path}: accepted: a folder that can be made and written to (Read-only")


def test_drift_is_not_measured_for_a_folder_that_takes_none(tiny_folder, tmp_path, capsys, mounted, monkeypatch):
    tiny.launch(train.main, [*tiny.small_run(tiny_folder, tmp_path / "out"), "constraint=none"])
    (run,) = runs(tmp_path / "out")
    mounted[tmp_path / "out" / "runs"] = errno.EROFS
    monkeypatch.setattr("cwac_lab.run.drift.load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    line = tiny.error_of(diagnose.main, [f"run={run.path}"], capsys, "diagnose")
    assert line.startswith(f"run={run.path}: accepted: a folder that can be made and written to")


@pytest.mark.parametrize("code", some([errno.EROFS, errno.EIO, errno.EACCES], errno.EROFS))
def test_what_becomes_unwritable_meanwhile_is_one_line_and_loses_no_record(
    code, tiny_folder, tmp_path, capsys, monkeypatch
):
    shared = [*tiny.small_run(tiny_folder, tmp_path), "constraint=none"]
    tiny.launch(train.main, [*shared, "seed=0"])
    (first,) = runs(tmp_path)
    before = {path: path.read_bytes() for path in first.path.iterdir() if path.is_file()}
    write = store.write_jsonl

    def gone(path, rows):
        if "-s1-" in str(path):
            raise OSError(code, os.strerror(code), str(path))
        write(path, rows)

    monkeypatch.setattr(store, "write_jsonl", gone)
    line = tiny.error_of(train.main, [*shared, "seed=1"], capsys)
    assert line.startswith(f"{os.strerror(code)}: {tmp_path}/runs/")
    assert f"(output_root={tmp_path})" in line
    assert before == {path: path.read_bytes() for path in before}
    assert [run.status for run in runs(tmp_path)] == ["ok", "failed"]


SLIPS = [
    FileNotFoundError(errno.ENOENT, "No such file or directory", "metrics.json"), OSError("no number"),
    OSError(errno.EINVAL, "Invalid argument"), ValueError("a slip"), SafetensorError("header too large"),
]  # fmt: skip


@pytest.mark.parametrize("slip", some(SLIPS, SLIPS[0], SLIPS[-1]))
def test_a_slip_of_the_program_keeps_its_traceback(slip, tiny_folder, tmp_path, monkeypatch):
    def slipped(*_, **__):
        raise slip

    monkeypatch.setattr("cwac_lab.run.stages._evaluate", slipped)
    monkeypatch.setattr("cwac_lab.run.stages._fine_tune", lambda *_: {})
    monkeypatch.setattr("cwac_lab.run.stages.export", lambda *_: None)
    with pytest.raises(type(slip), match=str(slip.args[-1]) if len(slip.args) == 1 else slip.strerror):
        tiny.launch(train.main, [*tiny.small_run(tiny_folder, tmp_path), "constraint=none"])


SETTINGS = {"output_root": "store", "cache_root": "store/cache"}


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.EROFS, "ro", "store/cache/x"), "ro: store/cache/x (cache_root=store/cache): accepted: a place"),
        (OSError(errno.EROFS, "ro", b"store/runs/x"), "ro: store/runs/x (output_root=store): accepted: a place that"),
        (OSError(errno.EACCES, "denied", "data/rows.csv"), "denied: data/rows.csv: accepted: a place that"),
        (OSError(errno.EROFS, "ro"), "ro (output_root=store or cache_root=store/cache): accepted: a place that"),
        (OSError(errno.EROFS, "ro", 3), "ro (output_root=store or cache_root=store/cache): accepted: a place that"),
        (OSError(errno.ENOSPC, "full"), "full: free some and run it again; what was recorded before in store is whole"),
        (OSError(errno.EDQUOT, "quota"), "quota: free some and run it again; what was recorded before in store is"),
        (OSError(errno.EEXIST, "exists", __file__), f"a file is in its place: {__file__}: accepted: a place that"),
        (OSError(errno.EEXIST, "exists", os.path.dirname(__file__)), None),
        (OSError(errno.ENOENT, "none", "store/x"), None),
        (SafetensorError("I/O error: Read-only file system (os error 30)"), "Read-only file system (output_root=store"),
        (SafetensorError("invalid header"), None),
    ],
)  # fmt: skip
def test_what_a_system_says_in_one_line(error, line):
    found = outputs.one_line(error, SETTINGS)
    assert found is None if line is None else str(found).startswith(line)


def test_a_store_that_can_only_be_read_is_read(tmp_path, monkeypatch):
    """Whether its process is alive cannot be asked there: what the record says stands."""
    run = RunFolder(tmp_path / "runs" / "one")
    run.path.mkdir(parents=True)
    run.mark("running")

    def denied(*_, **__):
        raise PermissionError(errno.EROFS, "Read-only file system", str(run.path / store.LOCK))

    monkeypatch.setattr("cwac_lab.results.store.FileLock.acquire", denied)
    assert run.status == "running"
    assert load(tmp_path)["status"].tolist() == ["running"]


def test_a_heartbeat_that_cannot_be_written_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "HEARTBEAT_SECONDS", 0.01)
    raised, beaten = [], threading.Event()
    monkeypatch.setattr(threading, "excepthook", lambda found: raised.append(found.exc_value))
    run, main = RunFolder(tmp_path / "one"), threading.main_thread()
    write = store.write_json

    def broken(path, value):
        if threading.current_thread() is not main:
            beaten.set()
            raise OSError(errno.EROFS, "Read-only file system")
        write(path, value)

    monkeypatch.setattr(store, "write_json", broken)
    with run.running():
        assert beaten.wait(5)
    assert (run.status, raised) == ("ok", [])


def test_of_an_error_whose_mark_cannot_be_written_the_error_is_told(tmp_path, monkeypatch):
    run = RunFolder(tmp_path / "one")

    def broken(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    def work():
        with run.running():
            monkeypatch.setattr(store, "write_json", broken)
            raise LabError("the real one")

    with pytest.raises(LabError, match="the real one"):
        work()
    with pytest.raises(OSError, match="Read-only"), RunFolder(tmp_path / "two").running():
        pass


def test_a_check_leaves_no_trace(tmp_path):
    outputs.writable("output_root", tmp_path / "a", "runs")
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*")] == [Path("a"), Path("a/runs")]
