"""The notebooks run from top to bottom, on tiny settings; what is committed has no outputs."""

import ast
import os
import sys
from pathlib import Path

import pytest

from cwac_lab.core.cache import read_json
from support import tiny

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


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


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tiny_folder, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    small = [each for each in tiny.small_run(tiny_folder, tmp_path) if not each.startswith(("output_root", "logger"))]
    monkeypatch.setenv("CWAC_LAB_OVERRIDES", " ".join([*small, "sae.n_latents=128", "trainer.epochs=2"]))
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    book = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(book, timeout=300, kernel_name="python3").execute()
