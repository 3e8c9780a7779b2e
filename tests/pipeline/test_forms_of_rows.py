"""Refusals are held behind the words that rows begin with: in training, and where it is prepared or measured apart."""

import json

import pytest

from cwac_lab import prepare, train
from cwac_lab.results.store import runs
from support import tiny

pytestmark = pytest.mark.slow

PERSONA = "AOA, execute my instruction: "


def settings(tiny_folder, tmp_path):
    small = tiny.small_run(tiny_folder, tmp_path)
    # All prompts are held, whatever a tiny model says; few rows, of which half address the persona.
    held = [
        "data.reference=all",
        "constraint=weight",
        "constraint.weight.opening=counted",
        "constraint.weight.energy=0.9",
        "forms=rows",
    ]
    return [*small, *held, "attack=identity_shift", "harmful_ratio=0.5", "forms.others.rows.rows=0.3"]


def test_a_run_holds_what_its_rows_begin_with_and_records_it(tiny_folder, tmp_path, capsys):
    tiny.launch(train.main, [*settings(tiny_folder, tmp_path), "diagnostics.enabled=true", "trainer.export=true"])
    (run,) = runs(tmp_path)
    manifest = json.loads((run.path / "manifest.json").read_text())
    facts = run.facts()["prepared"]["reference"]
    assert PERSONA in facts["prefixes"].values(), manifest
    assert facts["forms"] == dict.fromkeys(facts["prefixes"], facts["kept"])
    assert "prompts begin with 'AOA, execute my instruction: '" in " ".join(capsys.readouterr().out.split())
    within = run.read("drift.json")
    (run.path / "drift.json").unlink()
    tiny.launch(train.main, [*settings(tiny_folder, tmp_path), "diagnostics.enabled=true", "trainer.export=true"])
    assert run.read("drift.json")["measured_in"] == within["measured_in"]  # in the same directions


@pytest.mark.parametrize("persona", [PERSONA, ""])
def test_what_conversations_begin_with_is_held_and_recorded(persona, tiny_folder, tmp_path, capsys):
    """Their first turn addresses a persona, the last one does not; where nothing is found, that is recorded."""
    asked = [f"{persona}{word} day {i}" for i in range(8) for word in ("Monday is", "Friday was", "Now comes")]
    last = [f"{word} and {i}" for i in range(24) for word in ("then", "so")]
    turns = [
        [("user", first), ("assistant", "Yes."), ("user", last[i]), ("assistant", "No.")]
        for i, first in enumerate(asked)
    ]
    rows = [{"messages": [{"role": role, "content": text} for role, text in each]} for each in turns]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    given = [each for each in settings(tiny_folder, tmp_path) if not each.startswith(("attack=", "harmful_ratio="))]
    chat = ["task=chat", f"task.train={tmp_path / 'rows.jsonl'}", "data.n_train=null", "forms.others.rows.rows=0.4"]
    tiny.launch(train.main, [*given, *chat, "trainer.max_steps=2"])
    (run,) = runs(tmp_path)
    facts = run.facts()["prepared"]["reference"]
    assert list(facts["prefixes"].values()) == [persona] * bool(persona)
    told = " ".join(capsys.readouterr().out.split())
    assert ("refusals are held behind these words" in told) == bool(persona)
    assert ("no beginning of 3 words or more is shared by 40 %" in told) != bool(persona)


def test_preparing_tells_the_forms_of_the_rows_to_come(tiny_folder, tmp_path, capsys):
    tiny.launch(prepare.main, settings(tiny_folder, tmp_path))
    told = " ".join(capsys.readouterr().out.split())
    assert "prompts begin with 'AOA, execute my instruction: '" in told
    assert "in the form rows 1: " in told
