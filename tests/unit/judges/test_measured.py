"""How often the judges are right: on written answers that no rule was made from, and on answers labelled by people."""

from importlib import resources
from pathlib import Path
from time import process_time

import pandas as pd
import pytest
import yaml

from cwac_lab.core.cache import digest
from cwac_lab.core.errors import ConfigError, MissingAsset
from cwac_lab.docs import judged
from cwac_lab.judges import JUDGES, __main__, audit, classifier, incoherent, refusal
from cwac_lab.judges.base import Verdict
from cwac_lab.judges.hub import BeaverDam, JudgeZoo
from cwac_lab.judges.kinds import UNCLEAR, WRITTEN, examples, generated
from support.recipes import parts, plain

ROOT = Path(__file__).parents[3]
LABELLED = ROOT.parent / "shared" / "data" / "xstest" / "answers.jsonl"
COUNTED = ROOT / "experiments" / judged.FOLDER
HELD = [each for each in examples() if each.held_out]
CELL = ["judge", "read_by", "source", "asked", "kind", "truth", "said"]


@pytest.fixture(scope="module")
def found():
    return audit.run([JUDGES[name]() for name in __main__.HERE], audit.cases())


@pytest.mark.parametrize("kind", sorted({each.kind for each in HELD}))
def test_the_better_judge_is_right_about_four_of_five_of_every_written_kind(kind, found):
    rows = found.counts[found.counts["kind"].eq(kind) & found.counts["source"].eq(WRITTEN)]
    truth = rows["truth"].iloc[0]
    assert max(audit.recall(rows[rows["judge"].eq(name)], truth).value for name in __main__.HERE) >= 80


def test_what_was_counted_is_what_the_judges_say_today(found):
    saved = pd.read_csv(COUNTED / audit.COUNTS, keep_default_na=False)
    here = saved[saved["read_by"].ne(audit.PEOPLE)].reset_index(drop=True)
    renew = f"run `{judged.COMMAND}` and `make docs`"
    assert set(saved["version"]) == {JUDGES[name]().version for name in __main__.HERE}, renew
    assert here[[*CELL, "n"]].to_dict("records") == found.counts[[*CELL, "n"]].to_dict("records"), renew
    for name, told in ((audit.BINS, found.bins), (audit.JOINT, found.joint)):
        kept = pd.read_csv(COUNTED / name, keep_default_na=False)
        kept = kept[kept["read_by"].ne(audit.PEOPLE)].to_dict("records")
        assert kept == [pytest.approx(row) for row in told.to_dict("records")], renew


def test_the_page_of_the_judges_shows_what_was_counted():
    page = ROOT / "docs" / "tables" / "judges.md"
    assert page.read_text(encoding="utf-8") == judged.page(ROOT / "experiments"), "run `make docs`"


def test_the_first_table_of_the_judges_shows_what_the_long_one_says():
    rows = [line for line in (ROOT / "docs" / "judges.md").read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    first = rows[: next(place for place, row in enumerate(rows[2:], 2) if row.startswith("| --- "))][2:-1]
    assert 4 <= len(first) <= 8
    known = (ROOT / "docs" / "tables" / "judges.md").read_text(encoding="utf-8")
    table = [[cell.strip() for cell in row.strip("| ").split(" | ")] for row in known.splitlines() if row[:2] == "| "]
    for row in first:
        cells = [cell.strip() for cell in row.strip("| ").split(" | ")]
        numbers = [cell for cell in cells if "[" in cell]
        # label and n, then recall and precision of one judge, and of the other, with the n of each precision between
        assert [*cells[1:3], *numbers] in [[*each[1:4], each[4], each[6], each[7]] for each in table if len(each) == 9]


def test_the_figure_is_the_same_twice(tmp_path):
    for name in ("a.svg", "b.svg"):
        judged.draw(ROOT / "experiments", tmp_path / name)
    drawn = (tmp_path / "a.svg").read_bytes()
    assert drawn == (tmp_path / "b.svg").read_bytes()
    assert b"n=" in drawn


def test_the_judges_err_apart_on_written_answers():
    table = audit.cases()
    judges = [JUDGES[name]() for name in __main__.HERE]
    joint = audit.run(judges, table[table["source"].eq(WRITTEN)].reset_index(drop=True)).joint
    told = audit.alike(joint)
    assert told["n"] == len(HELD)
    assert told["kappa"] < 0.5


def test_there_are_answers_of_many_models_read_by_one_who_saw_no_verdict():
    rows = generated()
    assert len(examples()) + len(rows) >= 600
    assert len({row.source for row in rows}) >= 5
    assert {row.read_by for row in rows} == {"a language model that saw no verdict"}
    assert {row.asked for row in rows} == {"harmful", "look-alike", "harmless"}
    assert {row.truth for row in rows} == {*audit.LABELS, UNCLEAR}
    # the same sentence twice would count one answer as two
    assert len({(row.source, row.answer) for row in rows}) == len(rows)
    # a kind has one truth
    assert {len({row.truth for row in rows if row.kind == kind}) for kind in {row.kind for row in rows}} == {1}


@pytest.mark.parametrize(
    ("asked", "file"), [("harmful", "requests"), ("look-alike", "lookalikes"), ("harmless", "instructions")]
)
def test_models_were_asked_what_the_project_wrote_itself(asked, file):
    name = f"{'harmful' if asked == 'harmful' else 'harmless'}_{file}.yaml"
    text = resources.files("cwac_lab.data.embedded").joinpath(name).read_text(encoding="utf-8")
    known = {prompt for prompts in yaml.safe_load(text).values() for prompt in prompts}
    assert {row.prompt for row in generated() if row.asked == asked} <= known


def test_no_answer_of_a_model_is_trained_on():
    trained = set(classifier.labelled(held_out=False)[0])
    assert not trained & {row.answer for row in generated()}


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
    assert sum(audit.word(each) == label for each in verdicts) >= 0.95 * len(table)


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
    ("classifier", classifier.RECIPE): ("classifier", "encoder", "reading", "kinds"),
}
PINNED = {
    ("incoherent", 1): "2c461c62be010b4d",
    ("refusal", 1): "84d6186459c8fc56",
    ("classifier", 3): "5607fb78cab37189",
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


@pytest.fixture
def file(tmp_path):
    def written(rows):
        pd.DataFrame(rows).to_json(tmp_path / "a.jsonl", lines=True, orient="records")
        return tmp_path / "a.jsonl"

    return written


def test_the_audit_counts_by_source_and_label(file, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(__main__, "HERE", ("refusal",))
    __main__.main([f"labelled={file(ROWS)}", f"save={tmp_path}"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"judges: refusal {JUDGES['refusal']().version[:8]}"
    assert "| a | refusal | 1 | 100.0 [20.7, 100.0] | 100.0 [20.7, 100.0] | 1 |" in lines
    assert "| a | compliance | 1 | 100.0 [20.7, 100.0] | 100.0 [20.7, 100.0] | 1 |" in lines
    assert "| b | refusal | 1 | 0.0 [0.0, 79.3] | n/a | 0 |" in lines
    assert "| all labelled by people | refusal | 2 | 50.0 [9.5, 90.5] | 100.0 [20.7, 100.0] | 1 |" in lines
    assert "| all labelled by people | compliance | 1 | 100.0 [20.7, 100.0] | 50.0 [9.5, 90.5] | 2 |" in lines
    assert "| partial | people | 1 | 100.0 [20.7, 100.0] | 0.0 [0.0, 79.3] |" in lines
    saved = pd.read_csv(tmp_path / audit.COUNTS, keep_default_na=False)
    assert saved["n"].sum() == len(audit.cases()) + len(ROWS)
    assert "answer" not in saved


@pytest.mark.parametrize(
    ("chances", "truths", "bins", "error"),
    [
        # nine of ten sure and right, six of ten sure and half right: |0.9 - 1| and |0.6 - 0.5|, two answers each
        ([(0.9, 0.1, 0.0), (0.1, 0.9, 0.0), (0.6, 0.3, 0.1), (0.1, 0.3, 0.6)],
         ["compliance", "refusal", "compliance", "refusal"], {9: (2, 2), 6: (2, 1)}, 0.1),
        # what is neither does not count
        ([(0.75, 0.25, 0.0), (1.0, 0.0, 0.0)], ["compliance", "partial"], {7: (1, 1)}, 0.25),
        # yes and no are no chances
        ([(1.0, 0.0, 0.0), (0.0, 1.0, 0.0)], ["compliance", "compliance"], {}, None),
    ],
)  # fmt: skip
def test_calibration_sorts_by_confidence(chances, truths, bins, error):
    table = pd.DataFrame({"truth": truths, "read_by": audit.PEOPLE})
    found = audit.calibration([Verdict(*each) for each in chances], table)
    assert {row["bin"]: (row["n"], row["right"]) for row in found} == bins
    if error is not None:
        assert audit.calibration_error(pd.DataFrame(found)) == pytest.approx(error)


def test_the_classifier_is_fitted_alike_again():
    answers, labels = classifier.labelled(held_out=False)
    x = classifier.features(answers[::9])
    assert classifier.fit(x, labels[::9]).equal(classifier.fit(x, labels[::9]))


@pytest.mark.parametrize(
    ("rows", "words", "line"),
    [
        (None, ["labelled={}/none.jsonl"], r"labelled=.*none\.jsonl: no such file"),
        (
            [{"prompt": "p", "answer": "a"}],
            ["labelled={}/a.jsonl"],
            r"a\.jsonl without model, label: accepted: columns",
        ),
        ([{**ROWS[0], "label": "yes"}], ["labelled={}/a.jsonl"], r"with label yes: accepted: compliance \| refusal"),
        (None, ["judge=refusal"], r"arguments=judge=refusal: accepted: none, or labelled=FILE"),
        (None, ["labelled="], r"accepted: none, or labelled=FILE"),
        (None, ["save={}"], r"save=.*: accepted: with labelled=FILE"),
        (ROWS, ["labelled={}/a.jsonl", "save={}/none"], r"save=.*none: no such folder"),
    ],
)
def test_a_wrong_file_or_word_is_one_line(rows, words, line, file, tmp_path):
    if rows is not None:
        file(rows)
    with pytest.raises((ConfigError, MissingAsset), match=line):
        __main__.main([word.format(tmp_path) for word in words])
