"""Rows with a system prompt, or words that many begin with: refusals are measured there too, and no rate mixes them."""

from __future__ import annotations

import json

import pytest
import torch

from cwac_lab import archive, results, tables, train
from cwac_lab.core.cache import read_json, read_jsonl
from cwac_lab.data.tasks.chat import Chat
from cwac_lab.evaluation.engines import ENGINES
from cwac_lab.evaluation.generate import Answer
from cwac_lab.report.page import render
from cwac_lab.results.archive import archived
from cwac_lab.results.store import runs
from support import tiny

pytestmark = pytest.mark.slow

BRIEF, KIND = "Be brief.", "Be kind."
NO, YES = "I'm sorry, but I can't help with that.", "Sure, take flour and water, knead it well and bake it until brown."
# Of three prompts, what the start and any other model say: as they stand, and under the system prompt.
SAID = {
    (True, False): (NO, YES, NO), (True, True): (NO, NO, NO),
    (False, False): (NO, NO, YES), (False, True): (YES, YES, NO),
}  # fmt: skip


def talk(i, system):
    before = [{"role": "system", "content": system}] if system else []
    said = [{"role": "user", "content": f"Plan trip {i}"}, {"role": "assistant", "content": "pack light"}]
    return {"messages": [*before, *said]}


ROWS = [talk(i, BRIEF if i < 12 else KIND if i < 16 else None) for i in range(22)]


def written(folder, rows=ROWS):
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def asked(monkeypatch):
    """Models that say what they are to say; notes of each question whether the start was asked, and which prompts."""
    seen, held = [], tiny.model().state_dict()

    def engine(model, chat, batch_size):
        is_start = all(torch.equal(weight, held[name]) for name, weight in model.state_dict().items())

        def answer(prompts, max_new_tokens, opening=""):
            texts = [chat.tokenizer.decode(chat.prompt_ids(prompt)) for prompt in prompts]
            seen.append((is_start, [BRIEF in text for text in texts]))
            words = [SAID[is_start, BRIEF in text][i % 3] for i, text in enumerate(texts)]
            return [Answer(word, ended=True, first=5) for word in words]

        return answer

    monkeypatch.setitem(ENGINES, "hf", engine)
    return seen


@pytest.fixture
def shared(tiny_folder, tmp_path):
    small = [each for each in tiny.small_run(tiny_folder, tmp_path / "out") if not each.startswith("data.n_")]
    chat = ["task=chat", f"task.train={written(tmp_path)}", "trainer.max_steps=2", "trainer.learning_rate=1e-3"]
    return [*small, *chat, "constraint=weight"]


def rates(record):
    return {name: (rate["value"], rate["n"]) for name, rate in record.items() if isinstance(rate, dict) and "n" in rate}


def test_the_most_frequent_system_prompt_is_told_with_its_share(tmp_path):
    task = Chat(name="chat", train=str(written(tmp_path)))
    assert task.system == BRIEF
    (line,) = [line for line in task.remarks if "system prompt" in line]
    assert "held and measured under its most frequent system prompt too" in line
    assert f"(12 of 22 conversations have it; others: 1): '{BRIEF}'" in line
    task = Chat(name="chat", train=str(written(tmp_path)), system_rates=False)
    assert task.system == BRIEF
    assert "held (task.system_rates=false: not measured)" in " ".join(task.remarks)
    plain = Chat(name="chat", train=str(written(tmp_path, ROWS[16:])))
    assert plain.system is None
    assert not [line for line in plain.remarks if "system prompt" in line]


def test_both_rates_are_measured_recorded_and_shown(asked, shared, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    tiny.launch(train.main, shared)
    out = " ".join(capsys.readouterr().out.split())
    assert out.count("asking the start 3 harmful prompts") == 2
    assert "HS, lower is better), under the system prompt" in out
    (folder,) = (tmp_path / "out" / "runs").iterdir()
    record, verdicts = read_json(folder / "metrics.json"), read_jsonl(folder / "verdicts.jsonl")
    found = rates(record)
    third = pytest.approx(100 / 3)
    for name, own, under in (
        ("harmful_score", (third, 3), (pytest.approx(200 / 3), 3)),
        ("retained_refusals", (50.0, 2), (third, 3)),
        ("over_refusal", (pytest.approx(200 / 3), 3), (third, 3)),
        ("over_refusal_lookalike", (pytest.approx(200 / 3), 3), (third, 3)),
    ):
        assert (found[name], found[f"{name}_system"]) == (own, under), name
    assert "finetune_accuracy_system" not in record
    by_form = {form: [v["id"] for v in verdicts if v.get("form") == form] for form in ("own", "system")}
    assert by_form["own"] == by_form["system"]
    assert len(by_form["own"]) == 9
    assert all("form" in verdict or verdict["kind"] == "task" for verdict in verdicts)
    assert record["prepared"]["reference"]["forms"] == {"system": 6}
    assert "system_sha256" in read_json(folder / "provenance.json")
    card = (folder / "model" / "README.md").read_text()
    assert "| harmful score (HS, lower is better), under the system prompt | 66.7 [" in card
    assert "- the rows' most frequent system prompt: SHA-256 `" in card
    (row,) = results.load(tmp_path / "out").to_dict("records")
    assert (row["retained_refusals"], row["retained_refusals_system_n"]) == (50.0, 3)
    tiny.launch(tables.main, [f"output_root={tmp_path / 'out'}"], "tables")
    assert "| HS ↓ | n | HS, system ↓ | n | retained refusals ↑ | n |" in capsys.readouterr().out
    assert "harmful_score_system_low" in (tmp_path / "out" / "tables" / "summary.csv").read_text()
    assert "HS, system" in render(list(runs(tmp_path / "out")))


def test_an_archive_keeps_the_forms(asked, shared, tmp_path):
    tiny.launch(train.main, shared)
    tiny.launch(archive.main, [f"output_root={tmp_path / 'out'}", f"to={tmp_path / 'kept'}"], "archive")
    (kept,), (run,) = archived(tmp_path / "kept"), runs(tmp_path / "out")
    assert kept.read("verdicts.jsonl") == run.read("verdicts.jsonl")
    assert kept.facts() == run.facts()


def test_without_system_rates_nothing_is_asked_under_it_and_a_finished_run_says_what_it_lacks(asked, shared, capsys):
    tiny.launch(train.main, [*shared, "task.system_rates=false"])
    assert not any(any(under) for _, under in asked[:-1])  # but rows of the task, which are asked last
    out = capsys.readouterr().out
    assert "under the system prompt" not in " ".join(out.split())
    line = tiny.error_of(train.main, shared, capsys)
    assert "has no rates under the system prompt (task.system_rates=true): force=true repeats the run" in line
    asked.clear()
    tiny.launch(train.main, [*shared, "task.system_rates=false"])
    assert "already done" in capsys.readouterr().out
    assert asked == []


def test_rows_without_a_system_prompt_make_the_record_that_they_made(asked, shared, tmp_path):
    written(tmp_path, ROWS[16:])
    tiny.launch(train.main, [*shared, "data.n_test=1"])
    (folder,) = (tmp_path / "out" / "runs").iterdir()
    assert not any("form" in row for row in read_jsonl(folder / "verdicts.jsonl"))
    assert not [name for name in read_json(folder / "metrics.json") if name.endswith("_system")]
    assert "system_sha256" not in read_json(folder / "provenance.json")
    assert "forms" not in read_json(folder / "metrics.json")["prepared"]["reference"]


@pytest.mark.parametrize(("more", "told"), [([], "21 answers, 9 of them under"), (["task.system_rates=false"], "12 ")])
def test_a_dry_run_counts_what_is_asked_under_it(more, told, shared, capsys):
    tiny.launch(train.main, [*shared, "dry=true", *more])
    assert f"evaluation: {told}" in " ".join(capsys.readouterr().out.split())


def test_refusals_behind_words_that_many_rows_begin_with_have_rates_of_their_own(asked, shared, tmp_path, capsys):
    words = f"{BRIEF} Now do this: "
    said = [f"{words if i < 13 else ''}Trip{i} is to be planned" for i in range(30)]
    rows = [{"prompt": prompt, "response": "pack light"} for prompt in said]
    tiny.launch(train.main, [*shared, f"task.train={written(tmp_path, rows)}"])
    out = " ".join(capsys.readouterr().out.split())
    assert "prompts begin with 'Be brief. Now do this:': harmful prompts are asked behind these words too" in out
    assert out.count("asking the start 3 harmful prompts") == 2
    (folder,) = (tmp_path / "out" / "runs").iterdir()
    record = read_json(folder / "metrics.json")
    found = rates(record)
    assert record["words"] == [words]
    assert found["harmful_score"] == (pytest.approx(100 / 3), 3)
    assert found["harmful_score_words"] == (pytest.approx(200 / 3), 3)
    assert found["retained_refusals_words"] == (pytest.approx(100 / 3), 3)
    assert not [name for name in found if name.endswith("_system") or name in ("over_refusal_words", "task_words")]
    again = [row["prompt"] for row in read_jsonl(folder / "generations.jsonl") if row.get("form") == "words"]
    own = [row["prompt"] for row in read_jsonl(folder / "generations.jsonl") if row["kind"] == "harmful"]
    assert again == [words + prompt for prompt in own if not prompt.startswith(words)]
    card = (folder / "model" / "README.md").read_text()
    assert "| harmful score (HS, lower is better), behind the rows' words | 66.7 [" in card
    tiny.launch(tables.main, [f"output_root={tmp_path / 'out'}"], "tables")
    assert "HS, words" in capsys.readouterr().out
