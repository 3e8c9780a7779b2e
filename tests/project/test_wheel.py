"""What is installed without the checkout works without it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*words, **settings):
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, check=True, capture_output=True, text=True, **settings).stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder outside the checkout with nothing but the wheel in it."""
    where = tmp_path_factory.mktemp("wheel")
    run("-m", "hatchling", "build", "--target", "wheel", "--directory", where, cwd=ROOT)
    (wheel,) = where.glob("*.whl")
    run("-m", "pip", "install", "--no-deps", "--no-index", "--target", where / "site", wheel)
    return where / "site"


@pytest.mark.slow
def test_an_installed_wheel_trains_by_its_own_files(installed, tmp_path):
    """Configuration, word lists and the shipped start are in it; what is composed is found there, not here."""
    here = {**os.environ, "PYTHONPATH": str(installed)}
    assert "constraint: " in run("-m", "cwac_lab.train", "--help", cwd=tmp_path, env=here)
    files = "import cwac_lab, cwac_lab.core.paths as p; print(cwac_lab.__file__, p.conf_dir(), sep='\\n')"
    found = run("-c", files, cwd=tmp_path, env=here).splitlines()
    assert all(Path(line).is_relative_to(installed) for line in found)
    # What is no code is as in the checkout.
    source = ROOT / "src" / "cwac_lab"
    kept = {path.relative_to(source) for path in source.rglob("*.*") if path.suffix not in (".py", ".pyc")}
    kept |= {Path("conf") / path.relative_to(ROOT / "conf") for path in (ROOT / "conf").rglob("*.yaml")}
    assert len(kept) > 50
    assert not [path for path in kept if not (installed / "cwac_lab" / path).is_file()]
