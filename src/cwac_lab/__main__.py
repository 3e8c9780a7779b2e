"""All commands under one name: ``cwac-lab train ...`` is ``python -m cwac_lab.train ...``."""

from __future__ import annotations

import runpy
import sys

COMMANDS = {
    "train": "fine-tune under a constraint and write the record",
    "tables": "tables of records; exp=NAME makes the runs of an experiment that are missing",
    "report": "a page to explore all runs",
    "evaluate": "judge saved answers again",
    "compare": "two models on the same prompts: which refusals are retained",
    "diagnose": "measure what moved inside a model",
    "align": "the aligned start and its rates",
    "prepare": "build subspace and autoencoder ahead",
    "archive": "put the records of runs into two files",
    "replay": "make a recorded run again and say how it differs",
}


def main() -> None:
    """Run the command that the first argument names; exits with code 2 where it names none."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in COMMANDS:
        sys.argv = [f"cwac-lab {name}", *rest]
        runpy.run_module(f"cwac_lab.{name}", run_name="__main__", alter_sys=False)
        return
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {command:{width}}  {words}" for command, words in COMMANDS.items())
    print(f"cwac-lab COMMAND [key=value ...]; COMMAND --help tells its settings\n\n{listed}")
    if name not in ("--help", "-h"):
        print(f"error: {name}: accepted: {' | '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
