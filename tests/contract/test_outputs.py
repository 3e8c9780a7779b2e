"""Folders that cannot be written to, and paths with signs of their own: one line, before anything is computed."""

import errno
import os
import shlex
import tempfile
import threading
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from safetensors import SafetensorError

import tiny
from cwac_lab import cli, diagnose, outputs, overrides, tables, train
from cwac_lab.errors import LabError
from cwac_lab.report import __main__ as report
from cwac_lab.results import load, store
from cwac_lab.results.store import RunFolder, runs

ERRNOS = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE)


def error_of(main, arguments, capsys, name="config"):
    """Return the one line of an entry point that ends with code 2."""
    with pytest.raises(SystemExit) as stopped:
        tiny.launch(main, arguments, name)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line.removeprefix("error: ")


@pytest.fixture
def no_weights(monkeypatch):
    """Whoever loads weights has found out too late."""
    monkeypatch.setattr("cwac_lab.preparation.load_model", lambda *_, **__: pytest.fail("weights were loaded"))


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


@pytest.mark.parametrize("key", ["output_root", "cache_root"])
@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_what_is_in_the_way_is_named(key, obstacle, tiny_folder, tmp_path, capsys, no_weights):
    root = obstacle(tmp_path / "stands")
    shared = [*tiny.small_run(tiny_folder, tmp_path / "fine"), "constraint=none", f"{key}={root}"]
    line = error_of(train.main, shared, capsys)
    assert line.startswith(f"{key}={root}: accepted: a folder that can be made and written to ({OBSTACLES[obstacle]}")


def test_a_file_in_place_of_the_runs_is_named(tiny_folder, tmp_path, capsys, no_weights):
    root = runs_is_a_file(tmp_path / "stands")
    line = error_of(train.main, [*tiny.small_run(tiny_folder, root), "constraint=none"], capsys)
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


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("key", ["output_root", "cache_root"])
@pytest.mark.parametrize("code", ERRNOS)
def test_what_cannot_be_written_is_named(code, key, there, tiny_folder, tmp_path, capsys, no_weights, mounted):
    root = tmp_path / "mounted"
    root.mkdir()
    root = root if there else root / "out"
    mounted[tmp_path / "mounted"] = code
    shared = [*tiny.small_run(tiny_folder, tmp_path / "fine"), "constraint=weight", f"{key}={root}"]
    line = error_of(train.main, shared, capsys)
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
    line = error_of(train.main, [*shared, "constraint.weight.energy=0.5"], capsys)
    assert line.startswith(f"Read-only file system: {tmp_path / 'cache'}")
    assert f"(cache_root={tmp_path / 'cache'})" in line


@pytest.mark.parametrize(
    ("setting", "name"),
    [("output_root={}/out", "{}/out/sweeps"), ("hydra.sweep.dir={}/sweep", "{}/sweep"), ("hydra.run.dir={}/run", "")],
)
def test_folders_that_hydra_makes_are_named(setting, name, tiny_folder, tmp_path, capsys, no_weights):
    file = in_the_way(tmp_path / "stands")
    shared = [*tiny.small_run(tiny_folder, tmp_path / "fine"), "constraint=none", setting.format(file)]
    line = error_of(train.main, [*(["-m", "seed=0,1"] if name else []), *shared], capsys)
    assert line.startswith(f"Not a directory: {name.format(file)}")
    assert "hydra.sweep.dir" in line


def test_no_place_for_temporary_files(monkeypatch, capsys):
    def none(*_, **__):
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr("cwac_lab.cli.tempfile.TemporaryDirectory", none)
    assert error_of(train.main, [], capsys) == "TMPDIR: No usable temporary directory found in ['/tmp']"


@pytest.mark.parametrize("main", [(tables.main, "tables"), (report.main, "report")])
def test_tables_and_page_say_where_they_cannot_be_written(main, tiny_folder, tmp_path, capsys, mounted):
    (tmp_path / "runs").mkdir()
    mounted[tmp_path] = errno.EROFS
    line = error_of(main[0], [f"output_root={tmp_path}"], capsys, main[1])
    assert line.startswith(f"output_root={tmp_path}: accepted: a folder that can be made and written to (Read-only")


def test_drift_is_not_measured_for_a_folder_that_takes_none(tiny_folder, tmp_path, capsys, mounted, monkeypatch):
    tiny.launch(train.main, [*tiny.small_run(tiny_folder, tmp_path / "out"), "constraint=none"])
    (run,) = runs(tmp_path / "out")
    mounted[tmp_path / "out" / "runs"] = errno.EROFS
    monkeypatch.setattr("cwac_lab.probing.load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    line = error_of(diagnose.main, [f"run={run.path}"], capsys, "diagnose")
    assert line.startswith(f"run={run.path}: accepted: a folder that can be made and written to")


@pytest.mark.parametrize("code", [errno.EROFS, errno.EIO, errno.EACCES])
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
    line = error_of(train.main, [*shared, "seed=1"], capsys)
    assert line.startswith(f"{os.strerror(code)}: {tmp_path}/runs/")
    assert f"(output_root={tmp_path})" in line
    assert before == {path: path.read_bytes() for path in before}
    assert [run.status for run in runs(tmp_path)] == ["ok", "failed"]


@pytest.mark.parametrize(
    "slip",
    [FileNotFoundError(errno.ENOENT, "No such file or directory", "metrics.json"), OSError("no number"),
     OSError(errno.EINVAL, "Invalid argument"), ValueError("a slip"), SafetensorError("header too large")],
)  # fmt: skip
def test_a_slip_of_the_program_keeps_its_traceback(slip, tiny_folder, tmp_path, monkeypatch):
    def slipped(*_, **__):
        raise slip

    monkeypatch.setattr("cwac_lab.experiment._Stage.evaluate", slipped)
    monkeypatch.setattr("cwac_lab.experiment._Stage.fine_tune", lambda *_: {})
    monkeypatch.setattr("cwac_lab.experiment._Stage.export", lambda *_: None)
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


HOME = os.path.expanduser("~")
# An argument as a shell hands it over: what it sets its key to, or how its line goes on.
READ = {
    "model.path=~/m": f"{HOME}/m",
    "model.path='~/m'": f"{HOME}/m",
    'model.path="~/m"': f"{HOME}/m",
    "model.path=~": HOME,
    "++model.path=~/a=b": f"{HOME}/a=b",
    "model.path='a/~/m'": "a/~/m",
    "model.path=2024_10_01": "2024_10_01",
    "model.path=1e3": "1e3",
    "model.path=true": "true",
    "model.path=007": "007",
    "model.path=null": None,
    "model.path='it\\'s'": "it's",
    "model.path='模型/a=b,c [x] {y} #1 ~'": "模型/a=b,c [x] {y} #1 ~",
    "model.path='модель'": "модель",
    "model.path='النموذج'": "النموذج",
}
HINTS = {
    "model.path=runs/a=b": "\"model.path='runs/a=b'\"",
    "model.path=模型/m": "\"model.path='模型/m'\"",
    "model.path=модель": "\"model.path='модель'\"",
    "model.path=é/m": "\"model.path='é/m'\"",
    "model.path=a~b": "\"model.path='a~b'\"",
    "model.path=a/~/m": "\"model.path='a/~/m'\"",
    "model.path=x[1]/m": "\"model.path='x[1]/m'\"",
    "model.path=m (1)": "\"model.path='m (1)'\"",
    "model.path=a{b}": "\"model.path='a{b}'\"",
    "model.path=a#b": "\"model.path='a#b'\"",
    "model.path=a&b;c^d": "\"model.path='a&b;c^d'\"",
    "model.path=it's": "\"model.path='it\\'s'\"",
    "model.path='half": "\"model.path='half'\"",
    "model.path=a$b#!": "'model.path=\"a$b#!\"'",
    "data.root=d=1": "\"data.root='d=1'\"",
    "output_root=o=1": "\"output_root='o=1'\"",
    "cache_root=c=1": "\"cache_root='c=1'\"",
    "label=weight=0.5": "\"label='weight=0.5'\"",
    "++model.path=a=b": "\"++model.path='a=b'\"",
    "model.path=a,b": "\"model.path='a,b'\"",
}
OTHERS = {
    "foo": "foo: accepted: KEY=VALUE with a key of the configuration",
    "模型=3": "模型=3: accepted: KEY=VALUE with a key of the configuration",
    "evaluation.judges=[refusal": "evaluation.judges=[refusal: Hydra cannot read it (no viable alternative",
}


@pytest.mark.parametrize("argument", READ)
def test_a_path_is_read_as_it_is_meant(argument, capsys):
    seen = []
    tiny.launch(lambda config: seen.append(config.model.path), [argument])
    assert seen == [READ[argument]]
    assert cli.compose([argument]).model.path == READ[argument]


@pytest.mark.parametrize("argument", HINTS)
def test_what_hydra_cannot_read_is_named_with_a_hint(argument, capsys):
    """And the hint, given as it stands to a shell, sets the key to what was meant."""
    line = error_of(lambda _: pytest.fail("it ran"), [argument], capsys)
    assert line.startswith(f"{argument}: ")
    assert HINTS[argument] in line
    (typed,) = shlex.split(HINTS[argument])
    value = argument.partition("=")[2]
    assert OverridesParser.create().parse_override(typed).value() == value.lstrip("'")
    if "," not in value:
        with pytest.raises(LabError, match="is quoted twice"):
            cli.compose([argument])


@pytest.mark.parametrize("argument", OTHERS)
def test_other_arguments_that_cannot_be_read_are_named(argument, capsys):
    assert error_of(lambda _: pytest.fail("it ran"), [argument], capsys).startswith(OTHERS[argument])


@pytest.mark.parametrize(
    "value", ["plain/a-b_c.d", "a b", "模型", "a=b", "2024_10_01", "it's", 'say "so"', "~x", "a,b"]
)
def test_a_text_comes_through_as_an_argument(value):
    assert OverridesParser.create().parse_override(overrides.text("run", value)).value() == value


STRANGE = "模型 mod=el,1 [x] {y} it's #~"


def test_paths_of_any_signs_work_throughout(tmp_path, capsys):
    """One run, a sweep, drift of the run and of two folders, tables of an experiment; all in a strange place."""
    place = tmp_path / STRANGE
    place.mkdir()
    folder = tiny.save(place / "m")
    settings = [s for s in tiny.small_run(folder, place) if not s.startswith(("model.path", "output_root"))]
    where = [overrides.text("model.path", folder), overrides.text("output_root", place / "out")]
    tiny.launch(train.main, [*settings, *where, "constraint=weight"])
    tiny.launch(train.main, ["-m", *settings, *where, "constraint=none", "seed=0,1"])
    found = list(runs(place / "out"))
    assert [run.status for run in found] == ["ok"] * 3
    tiny.launch(diagnose.main, [overrides.text("run", found[-1].path), "measured_in=weight", "n_prompts=4"], "diagnose")
    both = [overrides.text("before", folder), overrides.text("after", found[-1].path / "model")]
    tiny.launch(diagnose.main, [*both, "measured_in=none", "n_prompts=4"], "diagnose")
    tiny.launch(tables.main, [overrides.text("output_root", place / "out")], "tables")
    assert (place / "out" / "tables" / "summary.csv").is_file()
    assert {path.name for path in place.iterdir()} == {"m", "out"}  # nothing went elsewhere


def test_a_home_folder_of_nobody_is_told(capsys):
    line = error_of(lambda _: pytest.fail("it ran"), ["output_root=~nobody_of_this_name/x"], capsys)
    assert line.startswith("output_root=~nobody_of_this_name/x: Hydra cannot read it (the sign ~)")


def test_a_home_folder_is_expanded_before_hydra_makes_folders(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    settings = [s for s in tiny.small_run(tiny_folder, tmp_path) if not s.startswith("output_root")]
    tiny.launch(train.main, ["-m", *settings, "output_root=~/out", "constraint=none", "seed=0,1"])
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert (tmp_path / "out" / "sweeps").is_dir()


def test_a_check_leaves_no_trace(tmp_path):
    outputs.writable("output_root", tmp_path / "a", "runs")
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*")] == [Path("a"), Path("a/runs")]
