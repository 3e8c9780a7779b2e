"""Tasks of lm-evaluation-harness: what is read of its results, what is told before weights are loaded, a real task."""

from importlib.util import find_spec

import pytest

from cwac_lab.config.run import check_machine, read
from cwac_lab.core.errors import ConfigError, LabError
from cwac_lab.evaluation import harness
from cwac_lab.evaluation.settings import EvaluationConfig
from cwac_lab.results.fields import check
from cwac_lab.results.record import Harness
from support import tiny
from support.harness import INSTALLED, WHY_NOT, results, stand_in, task_folder


@pytest.mark.parametrize(
    ("metric", "value", "error", "told"),
    [
        ("acc", 0.5, 0.1, (50.0, 30.4, 69.6, "%")),
        ("exact_match", 0.95, 0.1, (95.0, 75.4, 100.0, "%")),
        ("prompt_level_strict_acc", 0.05, 0.1, (5.0, 0.0, 24.6, "%")),
        ("inst_level_strict_acc", 0.25, None, (25.0, None, None, "%")),
        ("word_perplexity", 20.0, 2.0, (20.0, 16.08, 23.92, "")),
        ("bleu", 0.5, 0.4, (0.5, -0.284, 1.284, "")),
    ],
)
def test_a_metric_with_its_interval(metric, value, error, told):
    found = harness.interval(metric, value, error, 20, True)
    assert tuple(found[part] for part in ("value", "low", "high")) == pytest.approx(told[:3])
    assert (found["unit"], found["n"], found["better"]) == (told[3], 20, "higher")


# A group with metrics, one without, and a task by itself; as 0.4.13 returns them.
SEVERAL = {
    "results": {
        "whole": {"alias": "whole", "acc,none": 0.4, "acc_stderr,none": 0.1},
        "a": {"alias": " - a", "acc,none": 0.3, "acc_stderr,none": 0.1},
        "b": {"alias": " - b", "acc,none": 0.5, "acc_stderr,none": 0.1},
        "bare": {"alias": "bare"},
        "c": {"alias": " - c", "exact_match,strict": 0.5, "exact_match_stderr,strict": "N/A", "exact_match,loose": 1.0},
        "alone": {"alias": "alone", "sample_len": 3, "ppl,none": 9.0, "ppl_stderr,none": 1.0},
    },
    "group_subtasks": {"whole": ["a", "b"], "bare": ["c"]},
    "higher_is_better": {"whole": {"acc": True}, "c": {"exact_match": True}, "alone": {"ppl": False}},
    "n-samples": {name: {"original": 9, "effective": n} for name, n in {"a": 3, "b": 4, "c": 5, "alone": 6}.items()},
}


def test_groups_count_as_one_and_the_first_metric_comes_first(monkeypatch):
    stand_in(monkeypatch, SEVERAL)
    asked = EvaluationConfig(lm_eval=["whole", "bare", "alone"])
    found = harness.measured(asked, tiny.model(), tiny.chat())
    check(Harness, found, others=int)
    assert list(found["tasks"]) == ["whole", "c", "alone"]
    told = {
        (task, name): (each["n"], each["better"]) for task, of in found["tasks"].items() for name, each in of.items()
    }
    assert told == {
        ("whole", "acc,none"): (7, "higher"), ("c", "exact_match,strict"): (5, "higher"),
        ("c", "exact_match,loose"): (5, "higher"), ("alone", "ppl,none"): (6, "lower"),
    }  # fmt: skip
    assert list(found["tasks"]["c"]) == ["exact_match,strict", "exact_match,loose"]
    assert found["tasks"]["c"]["exact_match,strict"]["low"] is None


def test_the_model_is_asked_through_its_template_and_left_as_it_was(monkeypatch):
    calls, model, chat = stand_in(monkeypatch), tiny.model(), tiny.chat()
    own = model.generation_config
    asked = EvaluationConfig(lm_eval=["twenty"], lm_eval_limit=5)
    assert harness.measured(asked, model, chat)["tasks"]["twenty"]["acc,none"]["n"] == 5
    (call,) = calls
    assert (call["tasks"], call["limit"], call["apply_chat_template"]) == (["twenty"], 5, True)
    assert call["model"].model is model
    assert model.generation_config is own


@pytest.mark.parametrize(
    ("limit", "other", "asked"),
    [(5, {}, ["ifeval"]), (7, {}, ["gsm8k", "ifeval"]), (5, {"version": "0.1"}, ["gsm8k", "ifeval"])],
)
def test_tasks_that_a_record_has_are_kept_and_not_asked_again(limit, other, asked, monkeypatch):
    calls = stand_in(monkeypatch)
    known = {"version": harness.version("lm_eval"), "limit": 5, "asked": ["gsm8k", "mine"], **other}
    known |= {"tasks": {"gsm8k": {}, "mine": {}}}
    config = EvaluationConfig(lm_eval=["ifeval"], lm_eval_limit=limit)
    found = harness.measured(config, tiny.model(), tiny.chat(), known)
    same = asked == ["ifeval"]
    assert (calls[0]["tasks"], found["limit"]) == (asked, limit)
    assert found["asked"] == ["gsm8k", *(["mine"] if same else []), "ifeval"]  # an own task is not known here any more
    assert ({"gsm8k", "mine"} <= found["tasks"].keys()) == same


def test_a_failing_task_is_one_line(monkeypatch):
    stand_in(monkeypatch, ConnectionError("no hub\nhere"))
    with pytest.raises(LabError) as raised:
        harness.measured(EvaluationConfig(lm_eval=["gsm8k"]), tiny.model(), tiny.chat())
    assert str(raised.value) == "evaluation.lm_eval=[gsm8k]: lm_eval failed (ConnectionError: no hub here)"


def _line(*overrides):
    with pytest.raises(LabError) as raised:
        check_machine(read(tiny.config(*overrides)))
    return str(raised.value)


def test_without_the_harness_a_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(harness, "find_spec", lambda name: None if name == "lm_eval" else find_spec(name))
    assert _line("evaluation.lm_eval=[gsm8k,ifeval]") == (
        "evaluation.lm_eval=[gsm8k,ifeval]: accepted: [], or tasks where the harness is installed: "
        "pip install 'cwac-lab[lm-eval]'"
    )
    check_machine(read(tiny.config("evaluation.lm_eval=[]")))


def test_a_task_that_is_not_known_is_told_before_weights_are_loaded(monkeypatch, tmp_path):
    stand_in(monkeypatch)
    known = "accepted: a task of lm_eval 0.4.13"
    assert _line("evaluation.lm_eval=[gsm8k,twenty]").startswith(f"evaluation.lm_eval=twenty: {known}: lm-eval ls")
    folder = f"evaluation.lm_eval_tasks={task_folder(tmp_path)}"
    assert f"{known}, or of {tmp_path}" in _line("evaluation.lm_eval=[gsm9k]", folder)
    assert "no such folder" in _line("evaluation.lm_eval=[gsm8k]", f"evaluation.lm_eval_tasks={tmp_path / 'x'}")
    assert "[] with trainer.devices=2" in _line("evaluation.lm_eval=[gsm8k]", "trainer.devices=2")
    check_machine(read(tiny.config("evaluation.lm_eval=[gsm8k,twenty]", folder)))


@pytest.mark.parametrize(("tasks", "limit", "key"), [(["a", "a"], None, "lm_eval"), (["a"], 0, "lm_eval_limit")])
def test_settings_that_cannot_be(tasks, limit, key):
    with pytest.raises(ConfigError, match=f"^{key}="):
        EvaluationConfig(lm_eval=tasks, lm_eval_limit=limit)


@pytest.mark.parametrize(
    ("asked", "limit", "told", "lacks"),
    [
        ([], None, None, False),
        (["a"], None, None, True),
        (["a"], None, {"asked": ["a", "b"], "limit": None}, False),
        (["a", "c"], None, {"asked": ["a", "b"], "limit": None}, True),
        (["a"], 5, {"asked": ["a"], "limit": None}, True),
    ],
)
def test_what_a_record_lacks(asked, limit, told, lacks):
    record = {} if told is None else {"lm_eval": told}
    assert harness.lacks(EvaluationConfig(lm_eval=asked, lm_eval_limit=limit), record) is lacks


@pytest.mark.skipif(not INSTALLED, reason=WHY_NOT)
def test_a_local_task_is_asked_by_the_harness_itself(tmp_path):
    """Of two answers of one length the model's own choice counts, computed here by hand as well."""
    import torch

    model, chat = tiny.lively("llama"), tiny.chat()
    config = EvaluationConfig(lm_eval=["twenty"], lm_eval_tasks=str(task_folder(tmp_path / "tasks")))
    harness.check(config, 1)
    found = harness.measured(config, model, chat)
    check(Harness, found, others=int)
    right = 0
    for n in range(1, 21):
        sums = []
        for choice in ("no", "yes"):
            asked, answer = chat.prompt_ids(f"Is {n} more than ten?"), chat.tokens(choice)
            with torch.no_grad():
                said = model(torch.tensor([asked + answer])).logits[0].log_softmax(-1)
            sums.append(sum(float(said[len(asked) - 1 + at, token]) for at, token in enumerate(answer)))
        right += (sums[1] > sums[0]) == (n > 10)
    told = found["tasks"]["twenty"]["acc,none"]
    assert (told["value"], told["n"], told["better"]) == (pytest.approx(5 * right), 20, "higher")
    assert told == pytest.approx(harness._metrics(results(right / 20), "twenty")["acc,none"])
    with pytest.raises(ConfigError, match=r"evaluation\.lm_eval=thirty"):
        harness.check(EvaluationConfig(lm_eval=["thirty"], lm_eval_tasks=config.lm_eval_tasks), 1)
    assert harness.measured(EvaluationConfig(**{**vars(config), "lm_eval_limit": 4}), model, chat)["limit"] == 4
