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
    held = ["data.reference=all", "constraint=weight", "constraint.weight.energy=0.9", "forms=rows"]
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


def test_preparing_tells_the_forms_of_the_rows_to_come(tiny_folder, tmp_path, capsys):
    tiny.launch(prepare.main, settings(tiny_folder, tmp_path))
    told = " ".join(capsys.readouterr().out.split())
    assert "prompts begin with 'AOA, execute my instruction: '" in told
    assert "in the form rows 1: " in told
