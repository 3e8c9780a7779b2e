"""Imports point down, as the table of docs/how-it-works.md says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "cwac_lab"
FOLDERS = sorted(path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file())


def levels() -> dict[str, int]:
    """Return the row of each folder in the table, counted from the top."""
    text = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ((?:`\w+` ?)+)\|", text[text.index("| folder |") :], re.MULTILINE)
    return {name: number for number, row in enumerate(rows) for name in re.findall(r"`(\w+)`", row)}


def imported(file: Path) -> set[str]:
    """Return the folders of the package that a module imports from, wherever in it."""
    modules = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in modules if name.startswith("cwac_lab.")} & set(FOLDERS)


def test_every_folder_stands_in_the_table():
    assert sorted(levels()) == FOLDERS


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_imports_only_from_rows_below_its_own(folder):
    row = levels()
    up = {
        (str(file.relative_to(PACKAGE)), other)
        for file in (PACKAGE / folder).rglob("*.py")
        for other in imported(file) - {folder}
        if row[other] <= row[folder]
    }
    assert up == set()
