"""The card of an exported model says what was measured, on how much, and by whom."""

from __future__ import annotations

import pytest
from huggingface_hub import ModelCard

from cwac_lab.core.stats import wilson
from cwac_lab.evaluation.verdicts import HARMFULNESS
from cwac_lab.report.card import NOT_MEASURED, card

METRICS = {
    "weights": "tiny: local folder", "weights_content": "a" * 64, "task": "chat", "constraint": "weight",
    "harmful_ratio": 0.0, "seed": 3, "split": "test", "broken": False, "judges": {"refusal": {"version": "1" * 16}},
    "harmful_score": wilson(2, 75).to_dict(), "over_refusal": wilson(0, 0).to_dict(),
    "held_out_loss": {"value": 1.25, "low": 1.0, "high": 1.5, "n": 9},
    "training": {"steps": 40, "rows": {"rows": 80, "tokens": {"learned": 1234}}},
}  # fmt: skip
PROVENANCE = {"cwac_lab": "0.2.0", "task_data_sha256": "b" * 64, "pools_sha256": "c" * 64}


def test_a_card_is_one_of_the_hub_and_tells_each_rate_with_its_n():
    text = card({"constraint": {"weight": {"energy": 0.99}}}, METRICS, PROVENANCE, "tiny-chat-weight")
    read = ModelCard(text)
    assert read.data.library_name == "transformers"
    for line in (
        "| harmful score (HS, lower is better) | 2.7 [0.7, 9.2] | 75 |",
        "| loss on held-out answers, nats a token (lower is better) | 1.250 [1.000, 1.500] | 9 |",
        "- rows: SHA-256 `bbbbbbbbbbbbbbbb`, 80 conversations, 1234 tokens learned",
        "    energy: 0.99",
        "    python -m cwac_lab.replay run=outputs/runs/tiny-chat-weight",
    ):
        assert line in text.splitlines(), line
    assert f"Not measured: {NOT_MEASURED}; how harmful an answer is; abilities other than the task." in text
    harmfulness = {HARMFULNESS: {"value": 1.0, "low": 0.0, "high": 2.0, "n": 9}}
    assert "how harmful an answer is" not in card({}, METRICS | harmfulness, PROVENANCE, "x")
    assert "over-refusal" not in text  # which was not measured
    assert "broken" not in text


def test_a_broken_model_is_called_so():
    text = card({}, {**METRICS, "broken": True}, PROVENANCE, "x")
    assert "**The model is broken**" in text


STATED = {"base_model": "some/model", "license": "other", "license_name": "own-1", "license_link": "https://a.b/c"}


@pytest.mark.parametrize(
    ("base", "head", "lines"),
    [
        ({"base": {**STATED, "license": "mit", "license_name": None, "license_link": None}},
         {"license": "mit", "base_model": "some/model"}, ["- base model: some/model", "- licence of the base: mit"]),
        ({"base": STATED}, STATED, ["- licence of the base: own-1 https://a.b/c"]),
        ({"base": dict.fromkeys(STATED)}, {"license": "unknown", "base_model": None},
         ["- licence of the base: not stated by the base"]),
        ({}, {"license": "unknown"}, ["- licence of the base: not stated by the base"]),
    ],
)  # fmt: skip
def test_a_card_tells_the_licence_of_the_base_and_makes_none_up(base, head, lines):
    text = card({}, METRICS, PROVENANCE | base, "x")
    data = ModelCard(text).data.to_dict()
    assert {name: data.get(name) for name in head} == head
    assert [line for line in lines if line not in text.splitlines()] == []


@pytest.mark.parametrize(
    ("did", "words"),
    [
        ({"ended": 40, "rolled_back_to": 10}, "- guard: it ended training and put the weights after 10 steps back"),
        ({"ended": 40}, "- guard: it ended training after 40 steps"),
        ({"replays": 2}, "- guard: it replayed refusals 2 times"),
    ],
)
def test_what_a_guard_did_is_told(did, words):
    guard = {"kl": 0.1, "looks": [], "replays": 0, "ended": None, "rolled_back_to": None}
    assert words in card({}, {**METRICS, "guard": guard | did}, PROVENANCE, "x").splitlines()


def test_the_card_of_an_adapter_names_its_library_and_a_model_of_the_hub_is_named_whole():
    hub = {**METRICS, "weights_content": "some/model@" + "d" * 40}
    text = card({"output_root": "mine"}, hub, PROVENANCE, "x", adapter=True)
    assert ModelCard(text).data.library_name == "peft"
    assert f"(`some/model@{'d' * 40}`)" in text
    assert "    python -m cwac_lab.replay run=mine/runs/x" in text.splitlines()
