"""The notebooks run from top to bottom, on tiny settings; what is committed has no outputs."""

import ast
import os
import re
import sys
from pathlib import Path

import pytest

from cwac_lab.core.cache import read_json
from support import own_page, tiny

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
OWN = "04_bring_your_own"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped(path):
    for cell in read_json(path)["cells"]:
        assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == ([], None)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_a_notebook_imports_is_there(path):
    found = 0
    for cell in read_json(path)["cells"]:
        code = "".join(line for line in cell["source"] if not line.lstrip().startswith(("!", "%")))
        for node in ast.walk(ast.parse(code)) if cell["cell_type"] == "code" else ():
            if isinstance(node, ast.Import | ast.ImportFrom):
                exec(compile(ast.Module([node], []), str(path), "exec"), {})
                found += 1
    assert found


def test_the_notebook_of_ones_own_follows_the_page():
    """Its files and settings are those of the first example of ``docs/your-own.md``."""
    cells = ["".join(cell["source"]) for cell in read_json(FOLDER / f"{OWN}.ipynb")["cells"]]
    files = dict(cell.removeprefix("%%writefile ").split("\n", 1) for cell in cells if cell.startswith("%%writefile "))
    assert {name: f"{content}\n" for name, content in files.items()} == own_page.FILES
    (run,) = (cell for cell in cells if "carry_out(" in cell)
    given = re.findall(r'^    "(.+)",$', run, re.MULTILINE)
    assert given == own_page.overrides(own_page.COMMANDS[1])


@pytest.mark.exhaustive
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tiny_folder, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    left_out = ("output_root", "logger", *(("data.n_",) if path.stem == OWN else ()))  # it has rows of its own
    small = [each for each in tiny.small_run(tiny_folder, tmp_path) if not each.startswith(left_out)]
    monkeypatch.setenv("CWAC_LAB_OVERRIDES", " ".join([*small, "sae.n_latents=128", "trainer.epochs=2"]))
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    book = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(book, timeout=300, kernel_name="python3").execute()
