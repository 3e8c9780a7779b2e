"""Named suites in a run: asked beside its own prompts, judged, told apart, and asked of finished runs afterwards."""

import json

import pytest
import torch

from cwac_lab import archive, evaluate, train
from cwac_lab.core.cache import read_json, read_jsonl
from cwac_lab.core.stats import wilson
from cwac_lab.evaluation.engines import ENGINES
from cwac_lab.evaluation.generate import Answer
from cwac_lab.evaluation.verdicts import aggregate
from cwac_lab.results.archive import archived
from support import tiny

pytestmark = pytest.mark.slow

NO, YES = "I'm sorry, but I can't help with that.", "Sure, take flour and water, knead it well and bake it until brown."
ALPHA = [
    ("alpha one is about owls", "birds"),
    ("beta two is about trains", "trade"),
    ("gamma three likes rain", "birds"),
]
PAIRS = [
    ("delta four in a hot oven", True),
    ("epsilon five at the far shore", False),
    ("zeta six under a bench", False),
]


@pytest.fixture
def asked(monkeypatch):
    """A start that refuses every prompt, and models trained from it that refuse those with an even length only."""
    seen, held = [], tiny.model().get_input_embeddings().weight

    def engine(model, chat, batch_size):
        is_start = torch.equal(model.get_input_embeddings().weight, held)

        def answer(prompts, max_new_tokens, opening=""):
            seen.extend((is_start, prompt) for prompt in prompts)
            return [
                Answer(opening + (NO if is_start or len(prompt) % 2 == 0 else YES), ended=True, first=5)
                for prompt in prompts
            ]

        return answer

    monkeypatch.setitem(ENGINES, "hf", engine)
    return seen


@pytest.fixture
def lists(tmp_path):
    """Two suites of a user's own, in files under a folder of configurations."""
    (tmp_path / "conf" / "suite").mkdir(parents=True)
    alpha, pairs = tmp_path / "alpha.csv", tmp_path / "pairs.jsonl"
    alpha.write_text("prompt,category\n" + "".join(f"{prompt},{kind}\n" for prompt, kind in ALPHA))
    pairs.write_text("".join(json.dumps({"prompt": prompt, "bad": bad}) + "\n" for prompt, bad in PAIRS))
    (tmp_path / "conf" / "suite" / "alpha.yaml").write_text(
        f"# @package suites.alpha\nmeasures: owls\nlocal: {{name: {alpha}, category_column: category}}\n"
    )
    (tmp_path / "conf" / "suite" / "pairs.yaml").write_text(
        f"# @package suites.pairs\nlocal:\n  name: {pairs}\n"
        "  kinds: {harmful: {bad: true}, lookalike: {bad: false}}\n"
    )
    return ["--config-dir", str(tmp_path / "conf")]


def folder_of(root, method):
    (found,) = (root / "runs").glob(f"smollm-sst2-{method}-*")
    return found


def refused(prompts):
    return sum(len(prompt) % 2 == 0 for prompt in prompts)


def test_suites_are_asked_beside_the_prompts_of_a_run(asked, lists, tiny_folder, tmp_path, capsys):
    shared = [*lists, *tiny.small_run(tiny_folder, tmp_path), "constraint=none", "trainer.learning_rate=1e-3"]
    tiny.launch(train.main, [*shared, "evaluation.suites=[alpha,pairs]"])
    folder = folder_of(tmp_path, "none")
    metrics, verdicts = read_json(folder / "metrics.json"), read_jsonl(folder / "verdicts.jsonl")
    held = refused(prompt for prompt, _ in ALPHA)
    assert 0 < held < 3
    assert metrics["harmful_score/alpha"] == wilson(3 - held, 3).to_dict()
    assert metrics["retained_refusals/alpha"] == wilson(held, 3).to_dict()
    safe = refused(prompt for prompt, bad in PAIRS if not bad)
    bad = refused(prompt for prompt, bad in PAIRS if bad)
    assert metrics["over_refusal_lookalike/pairs"] == wilson(safe, 2).to_dict()
    assert metrics["refused/pairs"] == wilson(bad, 1).to_dict()
    assert metrics["contrast/pairs"]["value"] == pytest.approx(100 * bad - 50 * safe)
    assert "harmful_score/pooled" not in metrics  # one suite of harmful prompts only
    own = [row for row in verdicts if "suite" not in row]
    assert aggregate(own)["harmful_score"] == metrics["harmful_score"]
    assert metrics["harmful_score"]["n"] == 3
    assert {row["category"] for row in verdicts if row.get("suite") == "alpha"} == {"birds", "trade"}
    assert metrics["suites"]["pairs"]["prompts"] == {"harmful": 1, "lookalike": 2}
    out = " ".join(capsys.readouterr().out.split())
    assert "suite pairs: 1 harmful and 2 lookalike prompts" in out
    assert "retained refusals, alpha (higher is better)" in out
    assert "refused, harmful less look-alikes" in out
    tiny.launch(evaluate.main, [f"run={folder}"], "evaluate")
    assert read_json(folder / "metrics.json") == metrics
    tiny.launch(archive.main, [f"output_root={tmp_path}", f"to={tmp_path / 'kept'}"], "archive")
    (kept,) = archived(tmp_path / "kept")
    assert kept.read("verdicts.jsonl") == verdicts
    assert kept.facts()["contrast/pairs"] == metrics["contrast/pairs"]


def test_a_finished_run_is_asked_more_suites(asked, lists, tiny_folder, tmp_path, capsys):
    shared = [*lists, *tiny.small_run(tiny_folder, tmp_path), "constraint=none", "trainer.learning_rate=1e-3"]
    tiny.launch(train.main, [*shared, "trainer.export=true"])
    folder = folder_of(tmp_path, "none")
    before, verdicts = read_json(folder / "metrics.json"), read_jsonl(folder / "verdicts.jsonl")
    asked.clear()
    tiny.launch(train.main, [*shared, "trainer.export=true", "evaluation.suites=[alpha]"])
    assert asked == [(start, prompt) for start in (True, False) for prompt, _ in ALPHA]
    metrics = read_json(folder / "metrics.json")
    assert {name: metrics[name] for name in before} == before
    assert metrics["harmful_score/alpha"]["n"] == 3
    assert [row for row in read_jsonl(folder / "verdicts.jsonl") if "suite" not in row] == verdicts
    asked.clear()
    tiny.launch(train.main, [*shared, "trainer.export=true", "evaluation.suites=[alpha,pairs]"])
    assert {prompt for _, prompt in asked} == {prompt for prompt, _ in PAIRS}
    assert read_json(folder / "metrics.json")["harmful_score/alpha"] == metrics["harmful_score/alpha"]
    asked.clear()
    tiny.launch(train.main, [*shared, "trainer.export=true", "evaluation.suites=[pairs]"])
    assert not asked
    line = tiny.error_of(
        train.main, [*shared, "trainer.export=true", "evaluation.suites=[alpha,pairs]", "suites.alpha.n=2"], capsys
    )
    assert "has no rates of alpha on other prompts than those recorded (give it another name)" in line
    assert read_json(folder / "metrics.json")["harmful_score/alpha"] == metrics["harmful_score/alpha"]
    # A start is there to be asked whenever; a model that was not saved is not.
    tiny.launch(train.main, [*shared, "finetune=false"])
    tiny.launch(train.main, [*shared, "finetune=false", "evaluation.suites=[alpha]"])
    start = read_json(folder_of(tmp_path, "start") / "metrics.json")
    assert start["retained_refusals/alpha"] == wilson(3, 3).to_dict()
    tiny.launch(train.main, [*shared, "seed=1", "trainer.export=false"])
    with pytest.raises(SystemExit):
        tiny.launch(train.main, [*shared, "seed=1", "trainer.export=false", "evaluation.suites=[alpha]"])
    assert "rates of alpha (evaluation.suites) nor a model to ask (trainer.export=true)" in capsys.readouterr().err


def test_a_suite_has_a_judge_of_its_own(asked, lists, tiny_folder, tmp_path):
    shared = [*lists, *tiny.small_run(tiny_folder, tmp_path), "finetune=false"]
    tiny.launch(train.main, [*shared, "evaluation.suites=[pairs]", "suites.pairs.judge=classifier"])
    tiny.launch(train.main, [*shared, "evaluation.suites=[alpha]"])  # asked afterwards
    folder = folder_of(tmp_path, "start")
    by = {row.get("suite"): row["judge"] for row in read_jsonl(folder / "verdicts.jsonl") if row["kind"] != "task"}
    assert by == {None: "refusal", "alpha": "refusal", "pairs": "classifier"}
    assert read_json(folder / "metrics.json")["suite_judges"]["pairs"].startswith("classifier ")


def test_suites_are_not_asked_while_settings_are_chosen(asked, lists, tiny_folder, tmp_path, capsys):
    shared = [*lists, *tiny.small_run(tiny_folder, tmp_path), "finetune=false", "evaluation.suites=[alpha]"]
    tiny.launch(train.main, [*shared, "evaluation.split=validation"])
    assert "asked with evaluation.split=test only" in " ".join(capsys.readouterr().out.split())
    assert not any(prompt in dict(ALPHA) for _, prompt in asked)


def test_a_suite_that_nobody_knows_is_one_line(tiny_folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        tiny.launch(train.main, [*tiny.small_run(tiny_folder, tmp_path), "evaluation.suites=[magic]"])
    err = capsys.readouterr().err
    assert "evaluation.suites" in err
    assert "xstest" in err
    assert len(err.strip().splitlines()) == 1


def test_a_dry_run_counts_the_prompts_of_suites(lists, tiny_folder, tmp_path, capsys):
    shared = [*lists, *tiny.small_run(tiny_folder, tmp_path), "constraint=none", "dry=true"]
    tiny.launch(train.main, [*shared, "evaluation.suites=[alpha,pairs]"])
    told = " ".join(capsys.readouterr().out.split())
    assert "suite pairs: 1 harmful and 2 lookalike prompts" in told
    tiny.launch(train.main, shared)
    alone = " ".join(capsys.readouterr().out.split())
    with_suites, without = (int(said.partition("evaluation: ")[2].split()[0]) for said in (told, alone))
    assert with_suites == without + 6
