"""A sweep over options of a user's own folder: its workers find them, and an edited one makes another run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import yaml

from cwac_lab import tables
from cwac_lab.core import cli
from cwac_lab.core.overrides import parsed
from cwac_lab.results import load
from cwac_lab.sweep.cells import Cells
from support import tiny

OPTION = """# @package constraint.l2
_target_: cwac_lab.defenses.literature.l2.L2
strength: {strength}
"""
GRID = {"title": "mine", "cells": [{"task": "sst2", "harmful_ratio": 0.2, "constraint": ["none", "mine"]}]}


@pytest.fixture
def folder(tmp_path):
    options = tmp_path / "options" / "constraint"
    options.mkdir(parents=True)
    (options / "mine.yaml").write_text(OPTION.format(strength=1.0))
    return options


@pytest.mark.parametrize("name", ["mine", "my options (1)", "it's, ü=1"])
def test_a_folder_of_any_name_is_given_on(name, tmp_path, monkeypatch):
    entry = {"path": str(tmp_path / name), "schema": "file", "provider": "command-line"}
    known = {"path": "conf", "schema": "pkg", "provider": "main"}
    runtime = SimpleNamespace(runtime=SimpleNamespace(config_sources=[known, entry]))
    monkeypatch.setattr(cli, "HydraConfig", SimpleNamespace(initialized=lambda: True, get=lambda: runtime))
    (override,) = parsed(cli.search_path())
    assert [str(each) for each in override.value()] == [f"file://{tmp_path / name}"]


def test_a_cell_is_another_one_where_an_option_of_the_folder_it_names_was_edited(folder, tmp_path):
    given = ["constraint=mine", f"hydra.searchpath=[file://{tmp_path / 'options'}]"]
    cells = Cells(tmp_path)
    before, bare = cells._key(given), cells._key(given[:1])
    assert cells._key(given) == before != bare
    (folder / "mine.yaml").write_text(OPTION.format(strength=2.0))
    assert cells._key(given) != before
    assert cells._key(given[:1]) == bare


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_options_of_a_folder_are_swept_in_this_process_and_in_others(jobs, folder, tiny_folder, tmp_path):
    grids, output = tmp_path / "grids", tmp_path / "out"
    grids.mkdir()
    (grids / "mine.yaml").write_text(yaml.safe_dump(GRID))
    settings = [each for each in tiny.small_run(tiny_folder, output) if not each.startswith("output_root")]
    listed = "[" + ",".join(f"'{each}'" for each in settings) + "]"
    given = ["--config-dir", str(tmp_path / "options"), f"experiments_root={grids}", f"output_root={output}"]
    for strength in (1.0, 2.0):
        (folder / "mine.yaml").write_text(OPTION.format(strength=strength))
        cli._frame.cache_clear()  # as in another process
        tiny.launch(tables.main, [*given, "exp=mine", f"jobs={jobs}", f"overrides={listed}"], "tables")
    found = load(output)
    assert set(found["status"]) == {"ok"}
    assert sorted(found["constraint.l2.strength"].dropna()) == [1.0, 2.0]
