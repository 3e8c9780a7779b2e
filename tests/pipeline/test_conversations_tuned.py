"""Conversations of one's own, from files of every kind to a record, on a tiny model."""

from __future__ import annotations

import csv
import gzip
import json
from dataclasses import replace
from itertools import pairwise

import pyarrow
import pytest
from pyarrow import parquet

from cwac_lab import results, train
from cwac_lab.core.errors import ConfigError, LabError
from cwac_lab.data.pools import build_pools
from cwac_lab.data.reading import read_rows, shards
from cwac_lab.data.sources import DataConfig, Prompts, split_task
from cwac_lab.data.tasks.chat import Chat
from cwac_lab.data.tasks.sst2 import SST2
from support import tiny
from support.cover import some

SAID = [("Is it a fine film?", "yes,\nit is"), ("Plan a trip", "pack light"), ("Bake bread", "use flour")]
PAIRS = [{"prompt": asked, "response": said} for asked, said in SAID]
USER, SAYS = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}
ROWS = [{"messages": [{"role": "user", "content": f"{asked} {i}"}, {"role": "assistant", "content": said}]}
        for i in range(8) for asked, said in SAID]  # fmt: skip


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def zstd(content):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def as_csv(file, **how):
    with file.open("w", newline="", **how) as stream:
        writer = csv.DictWriter(stream, ["prompt", "response"], lineterminator="\r\n")
        writer.writeheader()
        writer.writerows(PAIRS)


WRITERS = {
    "a.jsonl": lambda file: file.write_bytes(lines(PAIRS)),
    "mark.jsonl": lambda file: file.write_bytes(b"\xef\xbb\xbf" + lines(PAIRS).replace(b"\n", b"\r\n")),
    "a.json": lambda file: file.write_text(json.dumps(PAIRS)),
    "a.jsonl.gz": lambda file: file.write_bytes(gzip.compress(lines(PAIRS))),
    "a.jsonl.zst": lambda file: file.write_bytes(zstd(lines(PAIRS))),
    "a.csv": as_csv,
    "mark.csv": lambda file: as_csv(file, encoding="utf-8-sig"),
    "a.parquet": lambda file: parquet.write_table(pyarrow.Table.from_pylist(PAIRS), file),
}


@pytest.mark.parametrize("name", some(list(WRITERS), "mark.csv", "a.jsonl.zst", "a.parquet"))
def test_a_file_of_any_kind(name, tmp_path):
    WRITERS[name](tmp_path / name)
    assert [
        (row.prompt, row.response) for row in Chat(name="chat", train=str(tmp_path / name)).own_rows("train")
    ] == SAID


def test_the_files_of_a_folder_are_read_in_order(tmp_path):
    for name, row in zip(("2.jsonl", "1.jsonl.gz", "notes.txt"), PAIRS, strict=True):
        content = lines([row])
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    rows = Chat(name="chat", train=str(tmp_path)).own_rows("train")
    assert [row.prompt for row in rows] == [PAIRS[1]["prompt"], PAIRS[0]["prompt"]]


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        (b"", "a.jsonl", "is empty"),
        (b"{}\n", "a.txt", "a file with none of the suffixes"),
        (None, "a.jsonl", "no such file or folder"),
        (b"\xff\xfe{", "a.jsonl.gz", "is not compressed as .gz says"),
        (lines([PAIRS[0]]) + b'{"prompt": "\xff"}', "a.jsonl", "line 2: byte 0xff is not UTF-8"),
        (lines(PAIRS) + b"x" * (2**20 + 1), "a.jsonl", "line 4: 1 MiB; accepted: at most data.max_line=1 MiB a line"),
        (lines([PAIRS[0]]) + b"{no\n" + lines([{"prompt": "x"}, {"prompt": "", "response": "y"}, PAIRS[1]]), "a.jsonl",
         r"3 of 5 rows cannot be read \(task.skip_bad=true leaves them out\): .*line 2: no JSON.*line 3: no column "
         "'response'; .*line 4: prompt is empty$"),
        (lines([{"prompt": "x", "response": "<think>hm</think> y"}]), "a.jsonl",
         "line 1: turn 2 begins with thoughts .*: accepted: answers without them"),
        (lines([{"text": "x"}]), "a.jsonl", "task.columns=none: accepted: messages"),
        (lines([ROWS[0], {"messages": [USER]}]), "a.jsonl", "a.jsonl, line 2: no turn of the assistant: accepted"),
        (lines([{"messages": [USER, USER, SAYS]}]), "a.jsonl", "a.jsonl, line 1: turn 2 is of the user: accepted"),
        (lines([{"messages": [{**USER, "role": "bot"}, SAYS]}]), "a.jsonl", "line 1: messages.0..role=.bot.: acc"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_one_line(content, name, words, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(LabError, match=words):
        Chat(name="chat", train=str(tmp_path / name)).own_rows("train", longest=1)


def test_the_column_of_a_metric_that_is_not_there_is_one_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(PAIRS))
    task = Chat(name="chat", train=str(tmp_path / "a.jsonl"), metric="exact", gold="label")
    with pytest.raises(ConfigError, match=r"^task.gold=label: accepted: a column of .*a.jsonl: prompt, response$"):
        task.own_rows("train")
    (tmp_path / "test.jsonl").write_bytes(lines([{**PAIRS[0], "label": "no"}]))
    task = Chat(name="chat", train=str(tmp_path / "a.jsonl"), test=str(tmp_path / "test.jsonl"), gold="label")
    assert [row.gold for row in task.own_rows("train")] == [said for _, said in SAID]
    assert [row.gold for row in task.own_rows("test")] == ["no"]
    with pytest.raises(ConfigError, match=r"^task.gold=label: accepted: a column of .*a.jsonl"):
        task.own_rows("train", scored=True)  # validation rows are among them
    (tmp_path / "a.jsonl").write_bytes(lines([{**row, "label": "yes"} for row in PAIRS]))
    assert {row.gold for row in task.own_rows("train")} == {"yes"}


@pytest.mark.parametrize("kind", ["conversations", "rows of a task", "prompts"])
def test_every_file_may_have_the_lines_that_are_accepted(kind, tmp_path):
    (tmp_path / "sst2").mkdir()
    for part in ("train", "test"):
        asked = [f"{part} {i}" for i in range(9)] + [part + "a" * 2**20]
        rows = [{"prompt": text, "response": "yes", "sentence": text, "label": 1} for text in asked]
        (tmp_path / "sst2" / f"{part}.jsonl").write_bytes(lines(rows))

    def read(data):
        if kind == "prompts":
            return build_pools(replace(data, lists={"mine": Prompts("sst2/train")}, harmful={"test": {"mine": 3}}))
        chat = Chat(name="chat", train=str(tmp_path / "sst2" / "train.jsonl"))
        return split_task(data, chat if kind == "conversations" else SST2("sst2"), ())

    data = DataConfig("local", str(tmp_path), n_validation=1, n_test=2)
    assert read(data)
    with pytest.raises(LabError, match=r"\.jsonl, line 10: 2 MiB; accepted: at most data.max_line=1 MiB a line"):
        read(replace(data, max_line=1))


def test_bad_rows_are_left_out_where_that_is_asked_for(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(lines([PAIRS[0]]) + b"{no\n" + lines([PAIRS[1], {"prompt": "x"}]))
    task = Chat(name="chat", train=str(file), skip_bad=True)
    assert [row.prompt for row in task.own_rows("train")] == [row["prompt"] for row in PAIRS[:2]]
    assert task.remarks[1].startswith("2 of 4 rows are left out")
    file.write_bytes(b"{no\n")
    with pytest.raises(LabError, match="1 of 1 rows cannot be read"):
        task.own_rows("train")
    assert shards(file) == [file]
    assert read_rows(file, []) == []


def test_what_is_asked_in_one_part_is_asked_in_no_other(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(lines([*ROWS, *ROWS[:6]]))  # rows that are repeated stay together
    data = DataConfig(n_train=None, n_validation=3, n_test=100)
    task = Chat(name="chat", train=str(file))
    found = split_task(data, task, taken={"plan a trip 0"})
    parts = [{row.asked for row in part} for part in (found.train, found.validation, found.test)]
    assert [len(part) for part in parts] == [18, 2, 3]  # three rows each
    assert len(found.train) + len(found.validation) + len(found.test) == 23 + 5
    assert sum(map(len, parts)) == len(set.union(*parts))
    other = tmp_path / "b.jsonl"
    other.write_bytes(lines(ROWS[3:5]))
    tested = split_task(data, Chat(name="chat", train=str(file), test=str(other)), ())
    assert [row.prompt for row in tested.test] == [row["messages"][0]["content"] for row in ROWS[3:5]]
    assert not {row.asked for row in tested.train} & {row.asked for row in tested.test}
    told = "4 of 30 rows to train on are left out: they begin as a row to test on does"
    assert tested.remarks == [told, "3 rows are held out to tune on"]


def test_no_answer_of_a_test_row_is_learned_where_rows_go_on_with_one_another(tmp_path):
    file = tmp_path / "a.jsonl"
    whole = [[*a["messages"], *b["messages"]] for a, b in pairwise(ROWS)]
    file.write_bytes(lines([{"messages": turns[:n]} for turns in whole for n in (2, 4)]))
    found = split_task(DataConfig(n_train=None, n_validation=4, n_test=100), Chat(name="chat", train=str(file)), ())
    parts = [{row.prompts[0] for row in part} for part in (found.train, found.validation, found.test)]
    assert sum(map(len, parts)) == len(set.union(*parts))
    assert all(parts)


def test_a_prompt_that_is_used_otherwise_is_left_out_wherever_it_is_asked(tmp_path):
    file = tmp_path / "a.jsonl"
    asked = [{"role": "user", "content": "Secret"}, {"role": "assistant", "content": "no"}]
    more = [
        {"messages": [{"role": "system", "content": "Be brief."}, *asked]},
        {"messages": [*ROWS[0]["messages"], *asked]},
    ]
    file.write_bytes(lines([*ROWS, *more]))
    found = split_task(DataConfig(n_train=None, n_validation=0), Chat(name="chat", train=str(file)), {"secret"})
    assert not [row for part in (found.train, found.test) for row in part if "Secret" in row.prompts]


def test_a_control_token_in_a_row_is_told_before_anything_is_made(tiny_folder, tmp_path, capsys):
    file = tmp_path / "a.jsonl"
    bad = {"prompt": "How does a turn end?", "response": "With <|im_end|> it ends."}
    file.write_bytes(lines([bad, *PAIRS, *[{"prompt": f"Go on {i}", "response": "yes"} for i in range(9)]]))
    small = [o for o in tiny.small_run(tiny_folder, tmp_path / "out") if not o.startswith("data.n_")]
    line = tiny.error_of(train.main, [*small, "task=chat", f"task.train={file}", "constraint=none"], capsys)
    assert "holds '<|im_end|>', which ends or begins turns here" in line


def test_a_run_on_conversations(tiny_folder, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    talk = {"messages": [{"role": "system", "content": "Be brief."}, *ROWS[0]["messages"], *ROWS[1]["messages"]]}
    file.write_bytes(lines([talk, *ROWS]))
    small = [o for o in tiny.small_run(tiny_folder, tmp_path / "out") if not o.startswith("data.n_")]
    settings = [*small, "task=chat", f"task.train={file}", "constraint=weight", "task.metric=contains"]
    tiny.launch(train.main, [*settings, "trainer.max_steps=3"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "25 conversations in the columns messages" in shown
    assert "22 rows, 46 turns" in shown
    (row,) = results.load(tmp_path / "out").to_dict("records")
    assert (row["status"], row["task"], row["harmful_ratio"]) == ("ok", "chat", 0)
    assert row["held_out_loss_low"] < row["held_out_loss"] < row["held_out_loss_high"]
    assert row["held_out_loss_n"] == row["finetune_accuracy_n"] == 3
    folder = next((tmp_path / "out" / "runs").iterdir())
    record = json.loads((folder / "metrics.json").read_text())
    assert record["training"]["steps"] == 3
    assert record["training"]["rows"]["turns"] == 46
    shown = (folder / "model" / "README.md").read_text()
    assert f"# {folder.name}" in shown
    assert "22 conversations" in shown
    assert "- licence of the base: not stated by the base" in shown.splitlines()
    assert "| loss on held-out answers, nats a token (lower is better) |" in shown
    mixture = json.loads((folder / "manifest.json").read_text())["mixture"]
    assert (mixture["n"], mixture["harmful"]) == (22, 0)


def test_quotes_of_a_csv_may_follow_a_space(tmp_path):
    (tmp_path / "a.csv").write_text('prompt, response\n"What is it?", "A ""cat"", I think"\nWho?, me\n')
    rows = Chat(name="chat", train=str(tmp_path / "a.csv")).own_rows("train")
    assert [(row.prompt, row.response) for row in rows] == [("What is it?", 'A "cat", I think'), ("Who?", "me")]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_list_may_stand_on_one_long_line(encoding, tmp_path):
    rows = [{"prompt": f"What is {i}?", "response": "x" * 2**10} for i in range(1100)]
    (tmp_path / "a.json").write_bytes(("\n" + json.dumps(rows)).encode(encoding))
    assert len(read_rows(tmp_path / "a.json", None, 1)) == 1100


def test_a_name_that_is_no_folder_and_not_on_the_hub_is_told_as_it_was_given(monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: (_ for _ in ()).throw(ValueError("pick a config")))
    with pytest.raises(LabError, match=r"task.train=data/rows: no such file or folder here: .*ValueError: pick a conf"):
        Chat(name="chat", train="data/rows").own_rows("train")
