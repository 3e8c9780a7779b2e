"""How often the judges are right: on written answers that no rule was made from, and on answers labelled by people."""

from collections import Counter
from pathlib import Path
from time import process_time

import pandas as pd
import pytest

from cwac_lab.core.cache import digest
from cwac_lab.core.errors import ConfigError, MissingAsset
from cwac_lab.core.stats import cohen_kappa
from cwac_lab.docs.long_tables import judged_by_kind
from cwac_lab.judges import JUDGES, __main__, classifier, incoherent, refusal
from cwac_lab.judges.hub import BeaverDam, JudgeZoo
from cwac_lab.judges.kinds import examples
from support.recipes import parts, plain

LABELLED = Path(__file__).parents[4] / "shared" / "data" / "xstest" / "answers.jsonl"
HELD = [each for each in examples() if each.held_out]


@pytest.fixture(scope="module")
def said():
    return {name: __main__.said_of_written(JUDGES[name]()) for name in __main__.HERE}


@pytest.mark.parametrize("kind", sorted({each.kind for each in HELD}))
def test_the_better_judge_is_right_about_four_of_five_of_every_kind(kind, said):
    places = [place for place, each in enumerate(HELD) if each.kind == kind]
    right = [sum(words[place] == HELD[place].truth for place in places) for words in said.values()]
    assert max(right) >= 0.8 * len(places)


def test_the_page_of_the_judges_shows_what_they_say(said):
    page = Path(__file__).parents[3] / "docs" / "tables" / "judges.md"
    judges = [JUDGES[name]() for name in said]
    assert page.read_text(encoding="utf-8") == judged_by_kind(judges, said), "run `make docs`"


def test_the_judges_err_apart(said):
    wrong = [[word != each.truth for word, each in zip(words, HELD, strict=True)] for words in said.values()]
    found = cohen_kappa(list(zip(*wrong, strict=True)))
    assert found["kappa"] < 0.5
    assert Counter(zip(*wrong, strict=True)).keys() >= {(True, False), (False, True)}


def test_what_is_held_out_is_not_trained_on():
    trained = set(classifier.labelled(held_out=False)[0])
    written = set(classifier.labelled(held_out=True)[0])
    assert written >= {each.answer for each in HELD if each.learned_as and each.answer.strip()}
    assert not trained & written


@pytest.mark.skipif(not LABELLED.is_file(), reason=f"no {LABELLED}")
@pytest.mark.parametrize("label", ["refusal", "compliance"])
def test_the_first_judge_agrees_with_people_in_nineteen_of_twenty(label):
    table = pd.read_json(LABELLED, lines=True)
    table = table[table["label"] == label]
    verdicts = refusal.RefusalJudge().verdicts(list(zip(table["prompt"], table["answer"], strict=True)))
    assert sum(__main__.word(each) == label for each in verdicts) >= 0.95 * len(table)


def test_the_first_judge_is_quick():
    judge = refusal.RefusalJudge()
    asked = [(each.prompt, " ".join([each.answer] * 5)[:800]) for each in HELD]
    judge.verdicts(asked)
    before = process_time()
    judge.verdicts(asked)
    assert (process_time() - before) / len(asked) < 0.005  # about a thousandth on an idle machine


@pytest.mark.parametrize("name", ["refusal", "classifier", "beaver_dam", "judgezoo"])
def test_the_rule_for_no_answer_is_part_of_every_version(name, monkeypatch):
    judge = {"beaver_dam": BeaverDam(), "judgezoo": JudgeZoo("harmbench")}.get(name) or JUDGES[name]()
    before = judge.version
    assert judge.version == before
    for module in ("refusal", "classifier", "hub"):
        monkeypatch.setattr(f"cwac_lab.judges.{module}.RULE", "another")
    assert judge.version != before


@pytest.mark.parametrize(
    ("module", "setting", "value"),
    [(refusal, "OPENING", 2), (refusal, "BRIEF", 5), (refusal, "RECIPE", 0), (refusal, "PREACHING", {}),
     (classifier, "OPENING", 100), (classifier, "END", 1), (classifier, "PENALTY", 1.0), (classifier, "RECIPE", 0)],
)  # fmt: skip
def test_every_setting_is_part_of_the_version(module, setting, value, monkeypatch):
    judge = JUDGES[module.__name__.rpartition(".")[2]]()
    before = judge.version
    monkeypatch.setattr(module, setting, value)
    assert judge.version != before


# The code that a recipe number stands for, without docstrings, imports and types. Who changes what one of these files
# says raises the number and writes the new line; who only moves code about writes the new line.
CODE = {
    ("incoherent", incoherent.RECIPE): ("incoherent", "reading"),
    ("refusal", refusal.RECIPE): ("refusal", "phrases", "reading"),
    ("classifier", classifier.RECIPE): ("classifier", "reading", "kinds"),
}
PINNED = {
    ("incoherent", 1): "2c461c62be010b4d",
    ("refusal", 1): "84d6186459c8fc56",
    ("classifier", 2): "c9ef2bd0aec50edc",
}


def code_of(names):
    return digest([plain(parts(f"judges.{name}")) for name in names])[:16]


@pytest.mark.parametrize("recipe", CODE)
def test_changed_code_raises_its_recipe(recipe):
    assert PINNED.get(recipe) == code_of(CODE[recipe]), "raise RECIPE, else versions would not tell; pin the code"


ROWS = [
    {"prompt": "Bake?", "answer": "I can't help with that.", "model": "a", "label": "refusal"},
    {"prompt": "Bake?", "answer": "Knead the dough, let it rise, and bake it.", "model": "a", "label": "compliance"},
    {"prompt": "Bake?", "answer": "Knead the dough and let it rest for an hour.", "model": "b", "label": "refusal"},
    {"prompt": "Bake?", "answer": "Part of it: knead the dough for ten minutes.", "model": "b", "label": "partial"},
]


def test_the_audit_counts_by_model_and_label(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(__main__, "HERE", ("refusal",))
    pd.DataFrame(ROWS).to_json(tmp_path / "a.jsonl", lines=True, orient="records")
    __main__.main([f"labelled={tmp_path / 'a.jsonl'}"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"judges: refusal {JUDGES['refusal']().version[:8]}"
    assert any(line.startswith("| refusal | a | refusal | 100.0 [20.7, 100.0] | 1 | 100.0") for line in lines)
    assert any(line.startswith("| refusal | all | refusal | 50.0 [9.5, 90.5] | 2 | 100.0") for line in lines)
    assert any(line.startswith("| refusal | all | compliance | 100.0 [20.7, 100.0] | 1 | 50.0") for line in lines)
    assert any(line.startswith("| refusal | b | partial, counted as compliance | 100.0") for line in lines)


@pytest.mark.parametrize(
    ("rows", "words", "line"),
    [
        (None, "labelled={}/none.jsonl", r"labelled=.*none\.jsonl: no such file"),
        ([{"prompt": "p", "answer": "a"}], "labelled={}/a.jsonl", r"a\.jsonl without model, label: accepted: columns"),
        ([{**ROWS[0], "label": "yes"}], "labelled={}/a.jsonl", r"with label yes: accepted: compliance \| refusal"),
        (None, "judge=refusal", r"arguments=judge=refusal: accepted: none, or labelled=FILE"),
        (None, "labelled=", r"accepted: none, or labelled=FILE"),
    ],
)
def test_a_wrong_file_or_word_is_one_line(rows, words, line, tmp_path):
    if rows is not None:
        pd.DataFrame(rows).to_json(tmp_path / "a.jsonl", lines=True, orient="records")
    with pytest.raises((ConfigError, MissingAsset), match=line):
        __main__.main([words.format(tmp_path)])
