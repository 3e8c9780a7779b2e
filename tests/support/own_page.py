"""The first example of ``docs/your-own.md`` as it stands there: three files, and commands that end at a model card."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs" / "your-own.md").read_text(encoding="utf-8")
PART = PAGE.partition("## From three files to a model card\n")[2].partition("\n## ")[0]
FILES = dict(re.findall(r"`(\w+\.jsonl)`.*?:\n\n```jsonl\n(.*?)```", PART, re.DOTALL))
SHELL = "\n".join(re.findall("^    (.*)", PART, re.MULTILINE))
COMMANDS = [shlex.split(line) for line in re.sub(r"\\\n", " ", SHELL).splitlines()]
OWN = PAGE.partition("## Your model, step by step\n")[2].partition("\n## ")[0]
STEPS = [shlex.split(line) for line in re.findall("^    (.*)", OWN, re.MULTILINE)]


def write_files(folder):
    """Make the files that the page tells its reader to make."""
    for name, content in FILES.items():
        (folder / name).write_text(content, encoding="utf-8")


def overrides(command):
    """The settings of a command of the page, without the program; its model is left to the caller."""
    program, settings = command[:3], command[3:]
    assert program == ["python", "-m", "cwac_lab.train"]
    return [each for each in settings if not each.startswith("model=")]
