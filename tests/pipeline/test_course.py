"""Runs whose refusals are followed while they are trained: the same runs, with samples on the way."""

import pandas as pd
import pytest

from cwac_lab import train
from cwac_lab.core.cache import read_json, read_jsonl
from cwac_lab.results import archive
from cwac_lab.results.store import runs
from support import tiny

pytestmark = pytest.mark.slow

SHARED = (
    *("constraint=weight", "constraint.weight.energy=0.9"),
    *("trainer.epochs=2", "trainer.learning_rate=1e-3", "trainer.export=true"),
)
FOLLOWED = ("evaluation.every_n_steps=3", "evaluation.watched=2")


@pytest.fixture(scope="module")
def made(tiny_folder, tmp_path_factory):
    """The folders of a run, of the same one followed, and of one with LoRA."""
    where = tmp_path_factory.mktemp("course")
    shared = [*tiny.small_run(tiny_folder, where / "plain"), *SHARED]
    for name, more in {"plain": (), "followed": FOLLOWED, "lora": (*FOLLOWED, "tuning=lora")}.items():
        tiny.launch(train.main, [*shared, f"output_root={where / name}", *more])
    return {name: next(iter((where / name / "runs").iterdir())) for name in ("plain", "followed", "lora")}


def test_to_be_followed_changes_nothing_that_a_run_computes(made):
    plain, followed = made["plain"], made["followed"]
    assert plain.name == followed.name
    assert read_jsonl(plain / "generations.jsonl") == read_jsonl(followed / "generations.jsonl")
    name = "model/model.safetensors"
    assert (plain / name).read_bytes() == (followed / name).read_bytes()
    assert not (plain / "course.json").exists()


@pytest.mark.parametrize("name", ["followed", "lora"])
def test_samples_are_kept_told_and_archived(name, made, tmp_path):
    found = read_json(made[name] / "course.json")
    assert [sample["step"] for sample in found["samples"]] == [3, 6, 8]
    assert (found["prompts"], len(found["start_refused"])) == (2, 2)
    for sample in found["samples"]:
        assert sample["kl"] > 0
        assert len(sample["refused"]) == len(sample["kl_by_prompt"]) == 2
    assert found["growth"] is None  # too few samples for a slope
    log = pd.read_csv(made[name] / "log" / "metrics.csv")
    assert log["course/kl"].dropna().tolist() == pytest.approx([sample["kl"] for sample in found["samples"][:2]])
    if any(found["start_refused"]):
        assert read_json(made[name] / "metrics.json")["half_lost"] == found["half_lost"]
    archive.add(tmp_path / "kept", list(runs(made[name].parent.parent)), force=False, say=print)
    (kept,) = runs(tmp_path / "kept")
    assert kept.read("course.json") == found


def test_the_last_sample_is_what_the_trained_model_says(made):
    """Of the first prompts the verdicts of the record are those of the last sample."""
    found = read_json(made["followed"] / "course.json")
    verdicts = [row for row in read_jsonl(made["followed"] / "verdicts.jsonl") if row["kind"] == "harmful"]
    assert found["samples"][-1]["refused"] == [int(row["refused"]) for row in verdicts[:2]]
    assert found["start_refused"] == [row["start_refused"] for row in verdicts[:2]]


def test_a_run_that_has_no_step_to_look_at_is_one_line(tiny_folder, tmp_path, capsys):
    given = [*tiny.small_run(tiny_folder, tmp_path), *SHARED, "evaluation.every_n_steps=8"]
    with pytest.raises(SystemExit):
        tiny.launch(train.main, given)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line == "error: evaluation.every_n_steps=8: accepted: 0, or less than the 8 steps of this run"


def test_a_finished_run_that_was_not_followed_says_so(made, tiny_folder, capsys):
    given = [*tiny.small_run(tiny_folder, made["plain"].parent.parent), *SHARED, *FOLLOWED]
    with pytest.raises(SystemExit):
        tiny.launch(train.main, given)
    assert "has no course.json of every 3 steps, which is taken while a model is trained" in capsys.readouterr().err
