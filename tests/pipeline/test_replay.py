"""A recorded run made again: from its folder, from an archive, with what came out and what else is different."""

import re
import shutil

import pytest

from cwac_lab import replay, train
from cwac_lab.results.archive import add
from cwac_lab.results.store import RunFolder, runs
from cwac_lab.run.replay import OTHER, ROUNDING, SAME, composed, environment, grade, outcome
from support import tiny
from support.recorded import record

TORCH = {"packages": {"torch": "1.0"}}


@pytest.fixture(scope="module")
def archive(tmp_path_factory, tiny_folder):
    """An archive of one run of a tiny model."""
    root = tmp_path_factory.mktemp("replay")
    given = [*tiny.small_run(tiny_folder, root / "out"), "constraint=weight", "evaluation.judges=[refusal]"]
    tiny.launch(train.main, [*given, "harmful_ratio=0.25", "seed=3"])
    add(root / "archive", runs(root / "out"), force=False, say=pytest.fail)
    return root / "archive"


def test_an_archived_run_made_again_is_the_same(archive, tiny_folder, tmp_path, capsys):
    (recorded,) = runs(archive)
    given = [f"run={recorded.path}", f"output_root={tmp_path / 'out'}"]
    # An archive has no folders of a machine.
    assert tiny.error_of(replay.main, given, capsys, "replay").startswith(f"model.path={tiny_folder.name}: accepted: a")
    given.append(f"overrides=['model.path={tiny_folder}']")
    tiny.launch(replay.main, given, "replay")
    (again,) = runs(tmp_path / "out")
    assert again.path.name == recorded.path.name  # the key is that of the recorded configuration
    told = capsys.readouterr().out
    assert "inputs and environment: same" in told
    assert re.search(r" 0 of \d+ ", told)
    # What is there already is compared, not made again.
    tiny.launch(replay.main, given, "replay")
    assert "already done" in capsys.readouterr().out
    heads, rows = outcome(recorded, again)
    assert {row[heads.index("difference")] for row in rows[:-1]} <= {"+0.0", ""}
    assert re.fullmatch(r"0 of \d+ differ", rows[-1][3])


def test_a_replay_is_one_process_that_tells_nobody(archive, tiny_folder, tmp_path):
    class Wide:
        status, path = "ok", tmp_path / "elsewhere"

        def config(self):
            (recorded,) = runs(archive)
            found = recorded.config()
            found["trainer"] |= {"strategy": "fsdp", "devices": 4, "export": True}
            found["logger"] |= {"wandb": "online"}
            found["model"] |= {"path": str(tiny_folder)}
            return found

    run = composed(Wide(), tmp_path, [])
    assert (run.trainer.strategy, run.trainer.devices, run.trainer.export) == ("ddp", 1, False)
    assert run.logger.wandb == "off"
    assert composed(Wide(), tmp_path, ["trainer.export=true"]).trainer.export


@pytest.fixture
def pair(tmp_path):
    """A record, and the one of the same run made again."""
    first = record(tmp_path / "one", "weight", 0.2, 0, 10)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    return first, RunFolder(tmp_path / "two" / "runs" / first.path.name)


@pytest.mark.parametrize(
    ("file", "then", "now", "expected", "what"),
    [
        ("provenance.json", {}, {}, SAME, None),
        ("provenance.json", TORCH, {"packages": {"torch": "2.0"}}, ROUNDING, ["packages.torch", "1.0", "2.0"]),
        ("provenance.json", {"platform": "a"}, {"platform": "b"}, ROUNDING, ["platform", "a", "b"]),
        ("provenance.json", {"devices": []}, {"devices": ["H"]}, ROUNDING, ["devices", "[]", "['H']"]),
        ("provenance.json", {"torch_threads": 1}, {"torch_threads": 2}, ROUNDING, ["torch_threads", "1", "2"]),
        ("provenance.json", {"weights_content": "a" * 64}, {"weights_content": "b" * 64}, OTHER,
         ["weights_content", "a" * 8, "b" * 8]),
        ("provenance.json", {"pools_sha256": "a"}, {"pools_sha256": "b"}, OTHER, ["pools_sha256", "a", "b"]),
        ("provenance.json", {"base_content": ""}, {}, SAME, None),
        ("provenance.json", {"own_sources": "a"}, {"own_sources": "b"}, OTHER, ["own_sources", "a", "b"]),
        ("provenance.json", {"git_commit": "a" * 40}, {"git_commit": "b" * 40}, OTHER, ["code", "a" * 8, "b" * 8]),
        ("provenance.json", {"git_commit": "a", "git_dirty": True}, {"git_commit": "a", "git_dirty": False}, OTHER,
         ["code", "a with changes", "a"]),
        # Of two commits of the same sources nothing is different.
        ("provenance.json", {"git_commit": "a", "sources": "s"}, {"git_commit": "b", "sources": "s"}, SAME, None),
        ("metrics.json", {}, {"judges": {"refusal": {"version": "2"}}}, OTHER,
         ["judge refusal", "3be1e32bf591cd0e", "2"]),
    ],
)  # fmt: skip
def test_what_differs_is_graded(file, then, now, expected, what, pair):
    for run, changes in zip(pair, (then, now), strict=True):
        run.write(file, run.read(file) | changes)
    _, changes = environment(*pair)
    assert grade(changes) == expected
    assert changes == ([] if what is None else [[*what, expected]])


def test_the_gravest_difference_counts():
    rows = [["a", "1", "2", grade] for grade in (ROUNDING, OTHER, ROUNDING)]
    assert (grade(rows), grade(rows[:1]), grade([])) == (OTHER, ROUNDING, SAME)


def test_how_an_outcome_differs(tmp_path):
    then, now = record(tmp_path / "one", "weight", 0.2, 0, 10), record(tmp_path / "two", "weight", 0.2, 0, 60, right=70)
    for run in (then, now):
        full = {"refused": False, "complied": False, "judge": "refusal"}
        run.write("verdicts.jsonl", [row if "correct" in row else full | row for row in run.read("verdicts.jsonl")])
    now.write("verdicts.jsonl", now.read("verdicts.jsonl")[:-1])
    _, rows = outcome(then, now)
    told = {row[0].partition(" (")[0]: row[1:] for row in rows}
    assert told["harmful score"] == ["10.0 [5.5, 17.4] (n=100)", "60.0 [50.2, 69.1] (n=100)", "+50.0", "no"]
    assert told["fine-tuning accuracy"][2:] == ["-10.0", "yes"]
    assert told["verdicts"][2] == "60 of 299 differ, 1 asked once only"


def overridden(*changes):
    return ["overrides=[" + ",".join(f"'{change}'" for change in changes) + "]"]


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["run=/nowhere/run"], "run=/nowhere/run: accepted: the folder of a run"),
        (overridden("seed=3"), "overrides=seed: accepted: settings that change no result: logger"),
        (overridden("trainer.epochs=3"), "overrides=trainer.epochs: accepted: settings that change no result"),
        (overridden("model.path=/nowhere"), "model.path=/nowhere: accepted: a folder with config.json"),
        (overridden("seed"), "seed: accepted: KEY=VALUE"),
    ],
)
def test_what_cannot_be_made_again_is_one_line_before_weights_are_loaded(
    given, line, archive, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("cwac_lab.run.start.load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    (recorded,) = runs(archive)
    out = tmp_path / "out"
    told = tiny.error_of(replay.main, [f"run={recorded.path}", f"output_root={out}", *given], capsys, "replay")
    assert told.startswith(line), told
    assert not list(out.glob("runs/*/metrics.json"))


def test_a_record_is_not_made_again_in_its_own_store_and_not_if_it_failed(archive, tmp_path, capsys):
    root = archive.parent / "out"
    (folder,) = runs(root)
    told = tiny.error_of(replay.main, [f"run={folder.path}", f"output_root={root}"], capsys, "replay")
    assert told.startswith(f"output_root={root}: accepted: another folder than that of the record")
    failed = record(tmp_path, "weight", 0.2, 0, 10)
    failed.mark("failed", "no room")
    told = tiny.error_of(replay.main, [f"run={failed.path}", f"output_root={tmp_path / 'out'}"], capsys, "replay")
    assert told.startswith(f"run={failed.path}: accepted: a finished run (this one is failed)")


def test_data_that_are_not_here_are_one_line(archive, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("cwac_lab.run.start.load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    (recorded,) = runs(archive)
    config = recorded.config()
    config["data"] |= {"source": "local", "root": str(tmp_path / "nowhere")}
    copy = RunFolder(tmp_path / "elsewhere" / "runs" / "local")
    for name, value in {"config.json": config, "metrics.json": recorded.facts()}.items():
        copy.write(name, value)
    copy.write("provenance.json", recorded.provenance())
    copy.mark("ok")
    told = tiny.error_of(replay.main, [f"run={copy.path}", f"output_root={tmp_path / 'out'}"], capsys, "replay")
    assert str(tmp_path / "nowhere") in told
