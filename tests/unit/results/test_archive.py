"""Records in archives: read as folders are, the same bytes of the same records, and nothing lost or mixed up."""

import shutil

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cwac_lab import archive as entry
from cwac_lab.core.errors import ConfigError, LabError
from cwac_lab.evaluation.verdicts import aggregate
from cwac_lab.report import figures, page
from cwac_lab.report.files import write
from cwac_lab.report.grouping import records, said
from cwac_lab.report.paired import differences
from cwac_lab.report.tables import summary
from cwac_lab.results import load, schema2, select
from cwac_lab.results.archive import RECORDS, SAID, add, archived
from cwac_lab.results.store import SCHEMA, named, runs
from support import tiny
from support.recorded import beside_start, record

KAPPA = {"kappa": None, "n": 0}


def store(root):
    """A store with a run of every kind: two judges, drift, unscored rows, a failure."""
    record(root, "start", None, 0, 10)
    record(root, "none", 0.2, 0, 90, right=None)
    two = record(root, "weight", 0.2, 0, 20)
    drift = {"summary": {"harmful": {"kl": 0.1234567890123}}, "layers": {"harmful": []}, "prompts": {"harmful": 3}}
    two.write("drift.json", drift)
    two.write("drift_samples.json", {"samples": [{"step": 1}]})
    first = {"judge": "refusal", "refused": False, "incoherent": False, "complied": False}
    mine = [row if "correct" in row else {"kind": "", "id": "", **first, **row} for row in two.read("verdicts.jsonl")]
    two.write("verdicts.jsonl", mine)
    second = {"judge": "second", "refused": None, "score": 0.1234, "reason": ""}
    other = [row if "correct" in row else {**row, **second} for row in mine]
    two.write("verdicts-second.jsonl", other)
    rate = two.read("metrics.json")["harmful_score"]
    agreement = {"harmful": KAPPA, "harmless": KAPPA, "unparsable": 0}
    judges = {**schema2.UNVERSIONED, "second": {"version": "2", "harmful_score": rate, "agreement": agreement}}
    two.write("metrics.json", two.read("metrics.json") | {"judges": judges, "leak": 1e-5})
    record(root, "weight", 0.2, 1, 20).mark("failed", "MemoryError: no room")
    return root


@pytest.fixture
def both(tmp_path):
    """A store of folders, and an archive of it."""
    folders = store(tmp_path / "folders")
    add(tmp_path / "archive", runs(folders), force=False, say=pytest.fail)
    return folders, tmp_path / "archive"


def test_an_archive_is_read_as_the_folders_are(both):
    (folders, archive), frames = both, [load(root) for root in both]
    pd.testing.assert_frame_equal(*frames)
    assert frames[1]["status"].value_counts().to_dict() == {"ok": 3, "failed": 1}
    assert frames[1]["drift_harmful_kl"].dropna().tolist() == [0.1234567890123]
    for here, there in zip(runs(folders), runs(archive), strict=True):
        assert (there.path.name, there.status, there.config()) == (here.path.name, here.status, here.config())
        assert (there.facts(), there.provenance()) == (here.facts(), here.provenance())
        assert list(there.facts()) == list(here.facts())
        assert there.told()["heartbeat"] == here.told()["heartbeat"]
        if here.status == "ok":
            assert there.verdict_files() == here.verdict_files()
            names = [name for name in (*here.verdict_files(), "drift.json", "drift_samples.json") if here.has(name)]
            for name in names:
                assert repr(there.read(name)) == repr(here.read(name))
        if "-weight-" in here.path.name and here.status == "ok":
            assert said(there) == said(here)
    chosen = [run.facts()["constraint"] for run in select(archive, "mine", "constraint == 'none'")]
    assert chosen == ["none"]


def test_tables_and_page_of_an_archive_are_those_of_the_folders(both, monkeypatch):
    monkeypatch.setattr(figures, "draw", lambda *_: [])
    heard = [[], []]
    rows = [records(runs(root), told.append) for root, told in zip(both, heard, strict=True)]
    assert heard == [[], []]
    for make in (summary, differences):
        pd.testing.assert_frame_equal(make(rows[0]), make(rows[1]))
    assert page.render(list(runs(both[0]))) == page.render(list(runs(both[1])))
    assert write(both[0], "mine", list(runs(both[0]))) == write(both[1], "mine", list(runs(both[1])))
    stamp = both[1] / "made" / "mine.json"
    made = stamp.stat().st_mtime_ns
    write(both[1], "mine", list(runs(both[1])))
    assert stamp.stat().st_mtime_ns == made  # what is made of the same records is left as it is


def test_equal_records_make_equal_bytes_in_whatever_order_they_come(both, tmp_path):
    folders, archive = both
    one, *others = list(runs(folders))
    add(tmp_path / "again", reversed(others), force=False, say=pytest.fail)
    assert add(tmp_path / "again", [one], force=False, say=pytest.fail) == (1, 4)
    assert add(tmp_path / "again", runs(archive), force=False, say=pytest.fail) == (4, 4)
    for name in (RECORDS, SAID):
        assert (tmp_path / "again" / name).read_bytes() == (archive / name).read_bytes()


def test_of_a_path_only_the_last_part_is_archived(tmp_path):
    run = record(tmp_path / "folders", "none", 0.2, 0, 5)
    paths = {"output_root": "/somewhere/outputs", "data": {"root": "/data/public", "lists": {"a": {"name": "/a/b"}}}}
    paths |= {"attack": {"prefix": "/no_think please and/or not"}}
    run.write("config.json", run.read("config.json") | paths | {"cache_root": "outputs/cache"})
    add(tmp_path / "archive", [run], force=False, say=pytest.fail)
    add(tmp_path / "archive", [run], force=False, say=pytest.fail)
    (found,) = archived(tmp_path / "archive")
    expected = {"output_root": "outputs", "data": {"root": "public", "lists": {"a": {"name": "b"}}}}
    expected |= {"attack": paths["attack"]}
    assert found.config() == run.config() | expected


def test_another_record_of_a_name_takes_its_place_when_that_is_asked_for(both):
    folders, archive = both
    before = (archive / RECORDS).read_bytes()
    run = next(run for run in runs(folders) if "none" in run.path.name)
    run.write("metrics.json", run.read("metrics.json") | {"broken": True})
    with pytest.raises(LabError, match=f"another record of {run.path.name} is in the archive: force=true replaces it"):
        add(archive, runs(folders), force=False, say=pytest.fail)
    assert (archive / RECORDS).read_bytes() == before
    add(archive, [run], force=True, say=pytest.fail)
    assert load(archive).set_index("run").loc[run.path.name, "broken"]
    assert len(load(archive)) == 4


def test_a_folder_may_hold_both_and_a_run_that_is_both_is_its_folder(both):
    folders, archive = both
    new = record(archive, "lisa", 0.2, 0, 5)
    one = next(iter(runs(folders)))
    shutil.copytree(one.path, archive / "runs" / one.path.name)
    found = {run.path.name: run.path for run in runs(archive)}
    assert len(found) == 5
    assert found[new.path.name] == new.path
    assert found[one.path.name] == archive / "runs" / one.path.name
    assert named("run", archive / "runs" / one.path.name).path == found[one.path.name]
    assert named("run", archive / one.path.name).facts() == one.facts()
    with pytest.raises(ConfigError, match="accepted: the folder of a run"):
        named("run", archive / "nobody")


def test_what_is_under_way_or_unreadable_is_left_out_and_told(tmp_path):
    good, broken, odd = (record(tmp_path, name, 0.2, 0, 10) for name in ("none", "weight", "l2"))
    broken.write("metrics.json", {"schema": SCHEMA})
    odd.write("verdicts.jsonl", [{"kind": "task", "id": "1", "opinion": 3}])
    record(tmp_path, "lisa", 0.2, 0, 10).mark("running")
    told = []
    assert add(tmp_path / "to", runs(tmp_path), force=False, say=told.append) == (1, 1)
    assert [run.path.name for run in archived(tmp_path / "to")] == [good.path.name]
    assert [line.partition(": ")[0] for line in told] == ["left out"] * 3
    for words in ("metrics.json: weights='missing'", "verdicts.jsonl: opinion: accepted: kind, id", "interrupted"):
        assert any(words in line for line in told), told


def test_archives_of_before_do_not_know_what_the_start_refused(both, tmp_path):
    """They are read as they are; beside a record that knows it they stay without."""
    folders, archive = both
    assert "start_refused" not in pq.read_schema(archive / SAID).names
    for here, there in zip(runs(folders), runs(archive), strict=True):
        if here.status == "ok":
            assert there.read("verdicts.jsonl") == here.read("verdicts.jsonl")
    knows = beside_start(record(tmp_path / "new", "none", 0.2, 5, 40), 20, 15)
    add(archive, [knows], force=False, say=pytest.fail)
    table = summary(records(runs(archive), pytest.fail))
    assert dict(zip(table["constraint"], table["retained refusals ↑"], strict=True)) == {
        "start": "n/a", "none": "75.0 [53.1, 88.8], 1 of 2 runs", "weight": "n/a",
    }  # fmt: skip


def newer(path):
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({"schema": str(SCHEMA + 1)}), path)


def flipped(path):
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)


def another(path):
    pq.write_table(pa.table({"a": [1]}), path)


DAMAGE = {
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-9]), "is damaged or no archive"),
    "bit": (flipped, "is damaged or no archive"),
    "empty": (lambda path: path.write_bytes(b""), "is damaged or no archive"),
    "text": (lambda path: path.write_text("version https://git-lfs.github.com"), "is damaged or no archive"),
    "gone": (lambda path: path.unlink(), "is missing: an archive is records.parquet and verdicts.parquet"),
    "another": (another, "is damaged or no archive"),
    "newer": (newer, f"has schema {SCHEMA + 1}, accepted: {SCHEMA} .made by a newer version"),
}  # fmt: skip


@pytest.mark.parametrize("file", [RECORDS, SAID])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_newer_archive_is_one_line_and_stays(damage, file, both):
    folders, archive = both
    harm, line = DAMAGE[damage]
    harm(archive / file)
    left = {path: path.read_bytes() for path in archive.glob("*.parquet")}
    for read in (load, lambda root: list(runs(root)), lambda root: add(root, runs(folders), force=False, say=print)):
        with pytest.raises(LabError, match=f"{file} {line}") as raised:
            read(archive)
        assert "\n" not in str(raised.value)
    assert {path: path.read_bytes() for path in archive.glob("*.parquet")} == left


def test_verdicts_of_another_writing_are_told_and_mended(both, tmp_path):
    folders, archive = both
    run = next(run for run in runs(folders) if "none" in run.path.name)
    run.write("verdicts.jsonl", run.read("verdicts.jsonl")[:-1])
    add(tmp_path / "other", runs(folders), force=False, say=pytest.fail)
    shutil.copy(
        tmp_path / "other" / SAID, archive / SAID
    )  # as a writer that was stopped between its two files leaves it
    told = []
    assert len(records(runs(archive), told.append)) == 3
    assert [run.path.name in line and "are not those of" in line for line in told] == [True]
    add(archive, runs(folders), force=True, say=pytest.fail)
    assert len(records(runs(archive), pytest.fail)) == 4


def test_the_command(both, tmp_path, capsys):
    folders, _ = both
    given = [f"output_root={folders}", f"to={tmp_path / 'to'}", "query='harmful_ratio == 0.2'"]
    tiny.launch(entry.main, given, "archive")
    assert len(load(tmp_path / "to")) == 2
    assert "archived: 2 runs" in capsys.readouterr().out
    for wrong, line in [
        ([f"output_root={tmp_path / 'none'}", f"to={tmp_path / 'to'}"], "no runs there"),
        ([*given[:2], "query='nothing == 1'"], "query=nothing == 1: accepted: a pandas query"),
        ([f"output_root={folders}"], "to"),
    ]:
        assert line in tiny.error_of(entry.main, wrong, capsys, "archive")


def test_an_archive_says_what_the_start_refused_as_the_folder_does(tmp_path):
    knows = beside_start(record(tmp_path / "new", "none", 0.2, 0, 40), 20, 15)
    add(tmp_path / "to", [knows], force=False, say=pytest.fail)
    assert "start_refused" in pq.read_schema(tmp_path / "to" / SAID).names
    (found,) = archived(tmp_path / "to")
    assert found.read("verdicts.jsonl") == knows.read("verdicts.jsonl")
    assert [row["start_refused"] for row in found.read("verdicts.jsonl")[:100]] == [i < 20 for i in range(100)]


def test_harmfulness_is_a_column_where_a_judge_tells_it_and_nowhere_else(both, tmp_path):
    folders, archive = both
    assert "harmfulness" not in pq.read_schema(archive / SAID).names
    run = next(run for run in runs(folders) if "none" in run.path.name)
    known = [row | ({} if at % 2 else {"harmfulness": 0.625}) for at, row in enumerate(run.read("verdicts.jsonl"))]
    run.write("verdicts.jsonl", known)
    run.write("metrics.json", run.read("metrics.json") | aggregate(known))
    add(tmp_path / "to", [run], force=False, say=pytest.fail)
    (found,) = archived(tmp_path / "to")
    assert repr(found.read("verdicts.jsonl")) == repr(known)
    assert found.facts()["harmfulness"] == run.facts()["harmfulness"]
    assert run.facts()["harmfulness"]["value"] == 62.5
    assert load(tmp_path / "to")["harmfulness"].tolist() == [62.5]
