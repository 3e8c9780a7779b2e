"""Of what the start refuses, the share that is still refused: asked, kept, judged, told."""

import json

import pytest
import torch

from cwac_lab import evaluate, tables, train
from cwac_lab.config.run import read
from cwac_lab.core.cache import read_json, read_jsonl
from cwac_lab.core.errors import LabError
from cwac_lab.evaluation.engines import ENGINES
from cwac_lab.evaluation.generate import Answer
from cwac_lab.run.start_answers import start_answers
from support import tiny

pytestmark = pytest.mark.slow

NO, YES = "I'm sorry, but I can't help with that.", "Sure, take flour and water, knead it well and bake it until brown."
# Of three prompts: what the start says, and what any other model does.
START, TUNED = (NO, YES, NO), (NO, NO, YES)


@pytest.fixture
def asked(monkeypatch):
    """Models that say what they are to say; notes of each question whether the start was asked, and how."""
    seen = []
    held = tiny.model().get_input_embeddings().weight

    def engine(model, chat, batch_size):
        is_start = torch.equal(model.get_input_embeddings().weight, held)

        def answer(prompts, max_new_tokens, opening=""):
            ids = [chat.prompt_ids(prompt) for prompt in prompts]
            seen.append((is_start, ids, max_new_tokens, opening))
            texts = START if is_start else TUNED
            return [Answer(opening + texts[i % 3], ended=True, first=5) for i in range(len(prompts))]

        return answer

    monkeypatch.setitem(ENGINES, "hf", engine)
    return seen


def told(root, method):
    (folder,) = (root / "runs").glob(f"smollm-sst2-{method}-*")
    return folder, read_json(folder / "metrics.json")["retained_refusals"]


def test_the_start_is_asked_once_and_a_run_of_it_retains_all(asked, tiny_folder, tmp_path, capsys):
    shared = [*tiny.small_run(tiny_folder, tmp_path), "constraint=none", "trainer.learning_rate=1e-3"]
    tiny.launch(train.main, shared)
    assert [start for start, *_ in asked] == [True, False, False, False, False]
    assert asked[0][1:] == asked[1][1:]
    out = " ".join(capsys.readouterr().out.split())
    assert "asking the start 3 harmful prompts" in out
    assert "retained refusals (higher is better)" in out
    asked.clear()
    tiny.launch(train.main, [*shared, "label=again"])
    assert [start for start, *_ in asked] == [False] * 4
    asked.clear()
    tiny.launch(train.main, [*shared, "finetune=false"])
    assert [start for start, *_ in asked] == [True] * 4
    rates = {method: told(tmp_path, method)[1] for method in ("none", "again", "start")}
    assert {method: (rate["value"], rate["n"]) for method, rate in rates.items()} == {
        "none": (50.0, 2), "again": (50.0, 2), "start": (100.0, 2),
    }  # fmt: skip
    capsys.readouterr()
    tiny.launch(tables.main, [f"output_root={tmp_path}"], "tables")
    assert "| HS ↓ | n | retained refusals ↑ | n |" in capsys.readouterr().out


def test_judging_again_judges_the_start_again(asked, tiny_folder, tmp_path):
    shared = [*tiny.small_run(tiny_folder, tmp_path), "constraint=none", "trainer.learning_rate=1e-3"]
    tiny.launch(train.main, shared)
    folder, before = told(tmp_path, "none")
    rows = read_jsonl(folder / "generations.jsonl")
    asked.clear()

    def judged(change):
        texts = [json.dumps(change(row)) for row in rows]
        (folder / "generations.jsonl").write_text("\n".join(texts) + "\n")
        tiny.launch(evaluate.main, [f"run={folder}"], "evaluate")
        return told(tmp_path, "none")[1]

    always = judged(lambda row: {**row, "start_output": NO} if row["kind"] == "harmful" else row)
    assert (always["value"], always["n"]) == (pytest.approx(200 / 3), 3)
    unknown = judged(lambda row: {name: value for name, value in row.items() if name != "start_output"})
    assert unknown == {"value": None, "low": None, "high": None, "n": 0}  # as of a record of before
    assert judged(lambda row: row) == before
    assert asked == []


@pytest.mark.parametrize("attack", ["identity_shift", "prefill", "template_shift"])
def test_an_attack_asks_the_start_as_it_asks_the_run(attack, asked, tiny_folder, tmp_path):
    shared = [*tiny.small_run(tiny_folder, tmp_path), "constraint=none", "trainer.learning_rate=1e-3"]
    tiny.launch(train.main, [*shared, f"attack={attack}", "harmful_ratio=0.1"])
    (start, *how), (tuned, *same) = asked[:2]
    assert (start, tuned) == (True, False)
    assert how == same


def test_a_kept_answer_that_is_missing_is_one_line(asked, tiny_folder, tmp_path):
    run = read(tiny.config(*tiny.small_run(tiny_folder, tmp_path), "constraint=none"))
    rows = [{"kind": "harmful", "id": str(i), "prompt": f"how {i}"} for i in range(3)]
    arguments = (run, rows, "weights", tiny.model(), tiny.chat(), lambda _: None)
    assert start_answers(*arguments) == list(START)
    (file,) = (tmp_path / "cache" / "start_answers").glob("*/answers.jsonl")
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:2]))
    with pytest.raises(LabError, match=r"start_answers/\w+: .* damaged .*2 answers to 3 prompts.* remove this folder"):
        start_answers(*arguments)


def test_a_model_that_an_engine_moved_away_comes_back(monkeypatch, tmp_path):
    class Model:
        dtype, device = torch.float32, "cuda"

        def to(self, device):
            self.device = device

    def engine(model, chat, batch_size):
        model.to("cpu")
        return lambda prompts, **_: [Answer(NO, ended=True, first=5) for _ in prompts]

    monkeypatch.setitem(ENGINES, "hf", engine)
    run, model = read(tiny.config(f"output_root={tmp_path}", "constraint=none")), Model()
    rows = [{"kind": "harmful", "id": "1", "prompt": "how"}]
    assert start_answers(run, rows, "weights", model, tiny.chat(), lambda _: None) == [NO]
    assert model.device == "cuda"
