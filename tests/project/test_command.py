"""All commands under one name."""

from __future__ import annotations

import importlib.util
import runpy
import sys

import pytest

from cwac_lab import __main__ as command


@pytest.mark.parametrize("name", command.COMMANDS)
def test_a_command_is_a_module_with_its_arguments(name, monkeypatch):
    ran = []
    monkeypatch.setattr(runpy, "run_module", lambda module, **_: ran.append((module, sys.argv[1:])))
    monkeypatch.setattr(sys, "argv", ["cwac-lab", name, "seed=1"])
    command.main()
    assert ran == [(f"cwac_lab.{name}", ["seed=1"])]
    assert importlib.util.find_spec(f"cwac_lab.{name}") is not None


def test_without_a_command_all_are_listed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cwac-lab"])
    command.main()
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert listed == list(command.COMMANDS)


def test_another_word_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cwac-lab", "trian"])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: trian: accepted: {' | '.join(command.COMMANDS)}\n"
