"""Rows and settings that cannot be used stop a run before weights are loaded, and prompts that are odd are told."""

import json
import re

import pytest

from cwac_lab import train
from cwac_lab.core.cache import read_jsonl
from cwac_lab.report.grouping import records
from cwac_lab.results.store import runs
from support import tiny

CHAT = [{"prompt": f"When is it open on day {i}?", "response": f"From {i} to six."} for i in range(20)]
ODD = [{"prompt": f"Say <|im_end|> {i} times", "response": "No."} for i in range(20)]


def settings(tiny_folder, tmp_path, rows):
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    small = [each for each in tiny.small_run(tiny_folder, tmp_path) if not each.startswith("data.n_train")]
    return [*small, "constraint=none", *(["task=chat", f"task.train={tmp_path / 'rows.jsonl'}"] if rows else [])]


@pytest.mark.parametrize(
    ("rows", "more", "said"),
    [
        (CHAT, ["harmful_ratio=0.9"], "harmful_ratio=0.9: accepted: at most 8 harmful rows at data.n_train=14"),
        (CHAT, ["data.n_train=500"], "data.n_train=500: accepted: at most 14 benign rows"),
        (CHAT, ["attack=outlier_benign"], "data.n_train=None: accepted: less than the 14 rows to choose from"),
        (ODD, [], r"rows.jsonl, line \d+ holds '<\|im_end\|>', which ends or begins turns here"),
        (
            [],
            ["data.n_train=8", "evaluation.every_n_steps=1000"],
            "evaluation.every_n_steps=1000: accepted: 0, or less than the ",
        ),
    ],
)
def test_what_cannot_be_trained_on_stops_before_weights_are_loaded(
    rows, more, said, tiny_folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("cwac_lab.run.start.load_model", lambda *_: pytest.fail("weights are loaded"))
    given = [*settings(tiny_folder, tmp_path, rows), *more]
    assert re.search(said, tiny.error_of(train.main, given, capsys))


def test_a_dry_run_finds_too_few_steps_as_well(tiny_folder, tmp_path, capsys):
    given = [*settings(tiny_folder, tmp_path, CHAT), "evaluation.every_n_steps=1000", "dry=true"]
    assert "evaluation.every_n_steps=1000: accepted: 0, or less than" in tiny.error_of(train.main, given, capsys)


def test_prompts_that_hold_a_token_of_the_template_are_told(tiny_folder, tmp_path, capsys):
    (tmp_path / "mine.jsonl").write_text(
        '{"prompt": "Hello <|im_end|> you"}\n{"prompt": "Open my neighbour\'s door"}\n'
    )
    mine = [f"+data.lists.mine={{name: {tmp_path / 'mine.jsonl'}}}", "+data.harmful.test.mine=2"]
    tiny.launch(train.main, [*settings(tiny_folder, tmp_path, []), *mine, "data.n_train=8", "finetune=false"])
    told = " ".join(capsys.readouterr().out.split())
    assert "1 prompts hold what ends or begins turns here, and are asked so: " in told
    (run,) = (tmp_path / "runs").iterdir()
    assert "Hello <|im_end|> you" in {row["prompt"] for row in read_jsonl(run / "generations.jsonl")}


@pytest.mark.parametrize("tuning", ["full", "lora", "null_space"])
def test_a_constraint_that_leaves_nothing_free_is_one_line(tuning, tiny_folder, tmp_path, capsys):
    given = [*settings(tiny_folder, tmp_path, []), "data.n_train=8", "constraint=weight", f"tuning={tuning}"]
    line = tiny.error_of(train.main, [*given, "constraint.weight.energy=1"], capsys)
    assert line.startswith("constraint.weight.energy=1")
    assert "accepted: a lower one: every direction is protected" in line


def test_what_lora_trains_beside_a_constraint_is_not_refused(tiny_folder, tmp_path):
    given = [*settings(tiny_folder, tmp_path, []), "data.n_train=8", "constraint=weight", "tuning=lora"]
    narrow = ["constraint.weight.modules=ffn_out", "constraint.weight.trainable=all", "constraint.weight.energy=1"]
    tiny.launch(train.main, [*given, *narrow, "trainer.max_steps=1"])
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "metrics.json").is_file()


def test_a_run_that_has_no_prompts_to_look_at_may_be_shorter_than_its_looks(tiny_folder, tmp_path):
    given = [*settings(tiny_folder, tmp_path, []), "data.n_train=8", "data.harmful.test.requests=0"]
    tiny.launch(train.main, [*given, "evaluation.every_n_steps=1000", "trainer.max_steps=2"])


def test_a_run_that_stops_so_is_recorded_as_failed(tiny_folder, tmp_path, capsys):
    given = [*settings(tiny_folder, tmp_path, []), "data.n_train=8", "evaluation.every_n_steps=1000"]
    tiny.error_of(train.main, given, capsys)
    (run,) = runs(tmp_path)
    assert run.status == "failed"
    assert [row["failed"] for row in records([run])] == [run.told()["reason"]]
