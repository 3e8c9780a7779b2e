"""How the judges do on answers whose truth is known: ``python -m cwac_lab.judges [labelled=FILE]``.

Always on the held-out part of the written answers, by kind. ``labelled=FILE`` adds a file of answers that people
labelled (JSON Lines with prompt, answer, model, and label: compliance, refusal, partial), e.g. XSTest's completions, by
model.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from cwac_lab.core.errors import ConfigError, LabError, MissingAsset
from cwac_lab.core.stats import Rate, cohen_kappa, wilson
from cwac_lab.judges import JUDGES, check
from cwac_lab.judges.base import Judge, Verdict, decided
from cwac_lab.judges.kinds import examples

# The judges that need no hub.
HERE = ("refusal", "classifier")
_FIELDS = {"complied": "compliance", "refused": "refusal", "incoherent": "incoherent"}
_COLUMNS = ("prompt", "answer", "model", "label")
_LABELS = ("compliance", "refusal", "partial")


def word(verdict: Verdict) -> str:
    """Return a verdict in a word, as ``evaluation.verdicts`` decides it; ``unknown`` where it decides for nothing."""
    return next((name for field, name in _FIELDS.items() if decided(getattr(verdict, field))), "unknown")


def labelled(path: Path) -> pd.DataFrame:
    """Return answers that people labelled.

    Raises:
        MissingAsset: If the file is not there.
        ConfigError: If it has other columns, or other labels.
    """
    if not path.is_file():
        raise MissingAsset(f"labelled={path}: no such file")
    table = pd.read_json(path, lines=True)
    missing = [name for name in _COLUMNS if name not in table]
    if missing:
        raise ConfigError("labelled", f"{path} without {', '.join(missing)}", f"columns {', '.join(_COLUMNS)}")
    others = sorted(set(table["label"].astype(str)) - set(_LABELS))
    if others:
        raise ConfigError("labelled", f"{path} with label {others[0]}", " | ".join(_LABELS))
    return table


def _share(right: Sequence[bool]) -> Rate:
    return wilson(sum(right), len(right))


def said_of_written(judge: Judge) -> list[str]:
    """Return what a judge says of the held-out written answers, in their order."""
    return [word(each) for each in judge.verdicts([(row.prompt, row.answer) for row in examples() if row.held_out])]


def by_kind(said: dict[str, list[str]]) -> list[str]:
    """Return the lines of a table: the share of held-out written answers that each judge gets right, by kind.

    Args:
        said: What ``said_of_written`` returns, by name of the judge.
    """
    held = [each for each in examples() if each.held_out]
    lines = [f"| kind | truth | n | {' | '.join(said)} |", "| --- " * (3 + len(said)) + "|"]
    places = {kind: [at for at, row in enumerate(held) if row.kind == kind] for kind in {row.kind: 0 for row in held}}
    for kind, mine in {**places, "all": list(range(len(held)))}.items():
        shares = [str(_share([words[at] == held[at].truth for at in mine])) for words in said.values()]
        truth = held[mine[0]].truth if kind != "all" else ""
        lines.append(f"| {kind} | {truth} | {len(mine)} | {' | '.join(shares)} |")
    return lines


def by_model(judges: Sequence[Judge], table: pd.DataFrame) -> list[str]:
    """Return the lines of a table: precision and recall on labelled answers, by judge, model and label.

    What is labelled partial is neither: of it the share is told that counts as compliance.
    """
    lines = ["| judge | model | label | recall | n | precision | n |", "| --- " * 7 + "|"]
    for judge in judges:
        said = pd.Series(
            [word(each) for each in judge.verdicts(list(zip(table["prompt"], table["answer"], strict=True)))]
        )
        for model in [*sorted(set(table["model"])), "all"]:
            of = (table["model"] == model) | (model == "all")
            for label in ("refusal", "compliance"):
                truth, found = table["label"].eq(label), said.eq(label)
                recall = _share(list(found[of & truth]))
                precision = _share(list(truth[of & found & table["label"].ne("partial")]))
                rates = f"{recall} | {recall.n} | {precision} | {precision.n}"
                lines.append(f"| {judge.name} | {model} | {label} | {rates} |")
            partly = _share(list(said[of & table["label"].eq("partial")].eq("compliance")))
            lines.append(f"| {judge.name} | {model} | partial, counted as compliance | {partly} | {partly.n} | | |")
    return lines


def agreement(judges: Sequence[Judge], table: pd.DataFrame) -> str:
    """Return how far the errors of two judges go together: Cohen's kappa of being wrong."""
    clear = table[table["label"].ne("partial")]
    asked = list(zip(clear["prompt"], clear["answer"], strict=True))
    wrong = [
        [word(each) != label for each, label in zip(judge.verdicts(asked), clear["label"], strict=True)]
        for judge in judges
    ]
    found = cohen_kappa(list(zip(*wrong, strict=True)))
    return f"errors of {judges[0].name} and {judges[1].name}: kappa {found['kappa']:.2f} (n={found['n']})"


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


def main(arguments: Sequence[str]) -> None:
    """Print the tables.

    Raises:
        ConfigError: If something else than ``labelled=FILE`` is asked for.
    """
    words = " ".join(arguments).replace("--labelled ", "labelled=").replace("--labelled=", "labelled=")
    if words in ("-h", "--help"):
        print(__doc__)
        return
    key, _, path = words.partition("=")
    if words and (key != "labelled" or not path):
        raise ConfigError("arguments", words, "none, or labelled=FILE")
    table = labelled(Path(path)) if path else None
    judges = runnable()
    said = {judge.name: said_of_written(judge) for judge in judges}
    print("judges: " + ", ".join(f"{judge.name} {judge.version[:8]}" for judge in judges))
    print("\n".join(["", "Right, of the held-out written answers, in percent:", "", *by_kind(said)]))
    if table is not None:
        print("\n".join(["", f"Answers labelled by people ({len(table)}), in percent:", "", *by_model(judges, table)]))
        if len(judges) > 1:
            print(f"\n{agreement(judges, table)}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except LabError as error:
        sys.exit(str(error))
