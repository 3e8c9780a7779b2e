"""What a public CI runs is what there is to run, on every Python that is admitted."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CI = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
JOB = CI["jobs"]["check"]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))


def asked(text):
    """Return the make targets that a text calls."""
    return re.findall(r"^\s*make ([a-z-]+)", text, re.M)


def test_ci_calls_targets_that_there_are():
    called = [target for step in JOB["steps"] for target in asked(step.get("run", ""))]
    assert called == ["setup", "lint", "types", "test"]
    assert set(called) <= TARGETS


def test_a_submission_passes_all_tests():
    called = asked((ROOT / ".ci" / "run").read_text())
    assert called == ["setup", "lint", "types", "test-all"]
    assert set(called) <= TARGETS


def test_every_python_that_is_admitted_is_tried():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lowest = int(re.fullmatch(r">=3\.(\d+)", project["requires-python"])[1])
    tried = JOB["strategy"]["matrix"]["python"]
    assert tried == [f"3.{lowest + i}" for i in range(len(tried))]
    assert len(tried) == 3


@pytest.mark.parametrize("step", [step for step in JOB["steps"] if "uses" in step], ids=lambda step: step["uses"])
def test_actions_are_of_a_pinned_major_version(step):
    assert re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"])


def test_tests_are_looked_for_in_every_folder_of_them():
    found = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["testpaths"]
    folders = {path.relative_to(ROOT).parts[1] for path in (ROOT / "tests").rglob("test_*.py")}
    assert sorted(found) == sorted(f"tests/{name}" for name in folders)
