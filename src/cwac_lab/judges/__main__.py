"""How often the judges are right: ``python -m cwac_lab.judges [labelled=FILE] [save=FOLDER]``.

Always on answers of the packaged models and on the held-out part of the written answers. ``labelled=FILE`` adds a file
of answers that people labelled (JSON Lines with prompt, answer, model, and label: compliance, refusal, partial), e.g.
XSTest's completions. ``save=FOLDER`` keeps what was counted, without any text, for ``python -m cwac_lab.docs``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from cwac_lab.core.errors import ConfigError, LabError, MissingAsset
from cwac_lab.judges import JUDGES, audit, check
from cwac_lab.judges.base import Judge

# The judges that need no hub.
HERE = ("refusal", "classifier")
_KEYS = ("labelled", "save")


def runnable() -> list[Judge]:
    """Return the judges that need no hub, without those whose package is not installed, which is told."""
    found = []
    for name in HERE:
        try:
            check([name])
        except ConfigError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        found.append(JUDGES[name]())
    return found


def _read(arguments: Sequence[str]) -> dict[str, Path]:
    """Return the files and folders that are named.

    Raises:
        ConfigError: If something else is asked for, or less than pages show would be saved.
        MissingAsset: If the folder to save in is not there.
    """
    rest = iter(arguments)
    joined = [f"{word}={next(rest, '')}" if word in [f"--{key}" for key in _KEYS] else word for word in rest]
    given = dict(word.removeprefix("--").partition("=")[::2] for word in joined)
    if not all(key in _KEYS and value for key, value in given.items()):
        raise ConfigError("arguments", " ".join(arguments), "none, or labelled=FILE, or labelled=FILE save=FOLDER")
    named = {key: Path(value) for key, value in given.items()}
    if "save" in named and "labelled" not in named:
        raise ConfigError("save", named["save"], "with labelled=FILE, as the pages show what people labelled too")
    if "save" in named and not named["save"].is_dir():
        raise MissingAsset(f"save={named['save']}: no such folder; accepted: experiments/judge_audit")
    return named


def main(arguments: Sequence[str]) -> None:
    """Print the tables, and save what they are made of where that is asked for.

    Raises:
        LabError: If an argument, or the file of labelled answers, cannot be used.
    """
    if set(arguments) & {"-h", "--help"}:
        print(__doc__)
        return
    named = _read(arguments)
    table = audit.cases(audit.labelled(named["labelled"]) if "labelled" in named else None)
    judges = runnable()
    if "save" in named and len(judges) < len(HERE):
        raise MissingAsset(f"save={named['save']}: needs {', '.join(HERE)}, all installed")
    found = audit.run(judges, table)
    print("judges: " + ", ".join(f"{judge.name} {judge.version[:8]}" for judge in judges))
    for title, lines in audit.tables(found.counts, found.bins, found.joint).items():
        print("\n".join(["", f"{title}:", "", *lines]))
    if "save" in named:
        found.save(named["save"])


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except LabError as error:
        sys.exit(str(error))
