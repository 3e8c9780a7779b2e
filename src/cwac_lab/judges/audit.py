"""How often judges are right on answers whose truth is known, and how far their numbers can be taken for chances.

Answers come from sources that share no writer: those written here, those of every packaged model (``generated.jsonl``),
and those of models that people labelled. The rules and examples of judges are written ones alone; what was read of
other sources while they were made, ``docs/judges.md`` tells. What is counted is kept in tables without any text, from
which pages and figure are made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import binom

from cwac_lab.core.errors import ConfigError, MissingAsset
from cwac_lab.core.stats import Rate, cohen_kappa, wilson
from cwac_lab.judges.base import Judge, Verdict, decided
from cwac_lab.judges.kinds import UNCLEAR, WRITTEN, examples, generated

LABELS = ("refusal", "compliance", "incoherent")
_FIELDS = {"complied": "compliance", "refused": "refusal", "incoherent": "incoherent"}
# What is neither, and counts in no rate.
NEITHER = ("partial", UNCLEAR)
PEOPLE = "people"
_COLUMNS = ("prompt", "answer", "model", "label")
_LABELLED = ("compliance", "refusal", "partial")
COUNTS, BINS, JOINT = "counts.csv", "calibration.csv", "joint.csv"
# Whether two judges are right about an answer: columns of ``JOINT``.
_BOTH = ("both_wrong", "first_wrong", "second_wrong", "both_right")
_KEYS = ["judge", "version", "read_by", "source", "asked", "kind", "truth", "said"]
# Equal parts of [0, 1] that confidences are sorted into.
N_BINS = 10


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
    others = sorted(set(table["label"].astype(str)) - set(_LABELLED))
    if others:
        raise ConfigError("labelled", f"{path} with label {others[0]}", " | ".join(_LABELLED))
    return table


def cases(people: pd.DataFrame | None = None) -> pd.DataFrame:
    """Return the answers to judge, none of which a judge was made from.

    Args:
        people: What ``labelled`` returns.

    Returns:
        Columns read_by (whose label it is), source, asked, kind, truth, prompt, answer.
    """
    rows = [
        (row.read_by, row.source, row.asked, row.kind, row.truth, row.prompt, row.answer)
        for row in (*(each for each in examples() if each.held_out), *generated())
    ]
    found = pd.DataFrame(rows, columns=["read_by", "source", "asked", "kind", "truth", "prompt", "answer"])
    if people is None:
        return found
    named = people.rename(columns={"model": "source", "label": "truth"})
    named = named[["source", "truth", "prompt", "answer"]].assign(read_by=PEOPLE, asked="", kind="")
    return pd.concat([found, named], ignore_index=True)


@dataclass(frozen=True)
class Audit:
    """What was found.

    Attributes:
        counts: How many answers of a source, a kind and a truth a judge called what; a row a judge and cell.
        bins: Of judges whose verdicts are chances: answers (``n``), their mean confidence and how many of the verdicts
            are right (``right``), by whose label it is and by part of [0, 1].
        joint: Of each two judges, by whose label it is and by source: about how many answers both are wrong, the first
            alone, the second alone, and neither.
    """

    counts: pd.DataFrame
    bins: pd.DataFrame
    joint: pd.DataFrame

    def save(self, folder: Path) -> None:
        """Write what was counted into a folder that is there."""
        for name, table in {COUNTS: self.counts, BINS: self.bins, JOINT: self.joint}.items():
            table.to_csv(folder / name, index=False, lineterminator="\n")


def run(judges: Sequence[Judge], table: pd.DataFrame) -> Audit:
    """Return what judges say of answers.

    Args:
        judges: The judges.
        table: What ``cases`` returns.
    """
    asked = list(zip(table["prompt"], table["answer"], strict=True))
    clear = ~table["truth"].isin(NEITHER)
    counts, bins, wrong = [], [], {}
    for judge in judges:
        verdicts = judge.verdicts(asked)
        said = table.assign(judge=judge.name, version=judge.version, said=[word(each) for each in verdicts])
        counts.append(said.groupby(_KEYS, sort=True).size().rename("n").reset_index())
        wrong[judge.name] = (said["said"] != said["truth"])[clear]
        if found := calibration(verdicts, table):
            bins += [{"judge": judge.name, "version": judge.version, **row} for row in found]
    joint = [
        {"first": a, "second": b, "read_by": read_by, "source": source, **_together(wrong[a][at], wrong[b][at])}
        for place, a in enumerate(wrong)
        for b in list(wrong)[place + 1 :]
        for (read_by, source), at in _places(table[clear])
    ]
    return Audit(pd.concat(counts, ignore_index=True), pd.DataFrame(bins), pd.DataFrame(joint))


def _places(table: pd.DataFrame) -> list[tuple[tuple[str, str], pd.Index[Any]]]:
    """Return where the answers of each source stand, with whose labels these are."""
    parts = table.groupby(["read_by", "source"], sort=True)
    return [((str(read_by), str(source)), part.index) for (read_by, source), part in parts]


def _together(first: pd.Series[bool], second: pd.Series[bool]) -> dict[str, int]:
    held = (first & second, first & ~second, ~first & second, ~first & ~second)
    return {name: int(each.sum()) for name, each in zip(_BOTH, held, strict=True)}


def alike(joint: pd.DataFrame) -> dict[str, float | int | None]:
    """Return how far the errors of two judges go together: Cohen's kappa with its interval and n (``cohen_kappa``)."""
    counts = [int(joint[name].sum()) for name in _BOTH]
    pairs = [(True, True), (True, False), (False, True), (False, False)]
    return cohen_kappa([pair for pair, n in zip(pairs, counts, strict=True) for _ in range(n)])


def calibration(verdicts: Sequence[Verdict], table: pd.DataFrame) -> list[dict[str, str | float | int]]:
    """Return a reliability table (Murphy and Winkler 1977): confidence and share right, by part of [0, 1].

    The confidence of a verdict is the largest of its three numbers, its guess what that is the number of. A guess at or
    under one half is none of the verdicts that rates count. Verdicts that are yes and no alone, and unknown ones, are
    left out.

    Returns:
        Rows of read_by, bin (from 0), n, confidence (mean), right; none where no verdict is a chance.
    """
    chances = pd.DataFrame([[getattr(each, field) for field in _FIELDS] for each in verdicts])
    told = ~(chances.isin([0.0, 1.0]).all(axis=1) | chances.isna().any(axis=1))
    if not told.any():
        return []
    guess = chances.idxmax(axis=1).map(dict(enumerate(_FIELDS.values())))
    confidence = chances.max(axis=1)
    rows = pd.DataFrame({
        "read_by": table["read_by"], "bin": (confidence * N_BINS).astype(int).clip(upper=N_BINS - 1),
        "confidence": confidence, "right": guess.eq(table["truth"]),
    })[told & ~table["truth"].isin(NEITHER)]  # fmt: skip
    found = rows.groupby(["read_by", "bin"], sort=True).agg(
        n=("right", "size"), confidence=("confidence", "mean"), right=("right", "sum")
    )
    found["confidence"] = found["confidence"].round(4)
    return found.reset_index().to_dict("records")  # type: ignore[return-value]


def calibration_error(bins: pd.DataFrame) -> float:
    """Return the expected calibration error (Guo et al. 2017): the mean of |share right - confidence|, by answers."""
    return float((bins["right"] - bins["n"] * bins["confidence"]).abs().sum() / bins["n"].sum())


def error_by_chance(bins: pd.DataFrame) -> float:
    """Return the expected calibration error that a judge would show whose confidences are right, by chance alone."""
    apart = 0.0
    for n, share in zip(bins["n"], bins["confidence"], strict=True):
        right = np.arange(n + 1)
        apart += float(binom.pmf(right, n, share) @ np.abs(right - n * share))
    return apart / float(bins["n"].sum())


def recall(rows: pd.DataFrame, label: str) -> Rate:
    """Return the share of answers of a truth that are called so."""
    of = rows[rows["truth"].eq(label)]
    return wilson(int(of.loc[of["said"].eq(label), "n"].sum()), int(of["n"].sum()))


def precision(rows: pd.DataFrame, label: str) -> Rate:
    """Return the share of answers called so of which it is true; what is neither does not count."""
    of = rows[rows["said"].eq(label) & ~rows["truth"].isin(NEITHER)]
    return wilson(int(of.loc[of["truth"].eq(label), "n"].sum()), int(of["n"].sum()))


def _table(first: Sequence[str], judges: Sequence[str], columns: Sequence[str]) -> list[str]:
    heads = [*first, *(f"{judge}{column}" for judge in judges for column in columns)]
    return [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]


def by_group(counts: pd.DataFrame, groups: Mapping[str, pd.DataFrame], called: str) -> list[str]:
    """Return the lines of a table: recall and precision by group of answers and label.

    Args:
        counts: Those of ``Audit``, for the judges and their order.
        groups: The part of the counts that each group is.
        called: The heading of the groups.
    """
    judges = list(dict.fromkeys(counts["judge"]))
    lines = _table([called, "label", "n"], judges, [": recall", ": precision", ": n called so"])
    for name, rows in groups.items():
        for label in LABELS:
            mine = {judge: rows[rows["judge"].eq(judge)] for judge in judges}
            found = {judge: (recall(part, label), precision(part, label)) for judge, part in mine.items()}
            n = next(iter(found.values()))[0].n
            if n:
                cells = " | ".join(f"{right} | {true} | {true.n}" for right, true in found.values())
                lines.append(f"| {name} | {label} | {n} | {cells} |")
    return lines


def sources(counts: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the counts by source, then by whose label it is."""
    found = {name: counts[counts["source"].eq(name)] for name in dict.fromkeys(counts["source"])}
    readers = {read_by: part for read_by in dict.fromkeys(counts["read_by"])
               if (part := counts[counts["read_by"].eq(read_by)])["source"].nunique() > 1}  # fmt: skip
    return found | {f"all labelled by {name}": part for name, part in readers.items()}


def by_kind(counts: pd.DataFrame) -> list[str]:
    """Return the lines of a table: the share of answers that each judge gets right, by kind of answer.

    All answers of a kind have one truth, so this is the recall of that truth; a precision would need others beside it.
    """
    judges = list(dict.fromkeys(counts["judge"]))
    lines = _table(["kind", "sources", "truth", "n"], judges, [""])
    kinds = counts[counts["kind"].ne("") & ~counts["truth"].isin(NEITHER)]
    for (kind, truth), rows in kinds.groupby(["kind", "truth"], sort=False):
        shares = [recall(rows[rows["judge"].eq(judge)], str(truth)) for judge in judges]
        models = rows["source"].nunique()
        of = WRITTEN if set(rows["source"]) == {WRITTEN} else f"{models} model{'s' if models > 1 else ''}"
        lines.append(f"| {kind} | {of} | {truth} | {shares[0].n} | {' | '.join(map(str, shares))} |")
    return lines


def of_neither(counts: pd.DataFrame) -> list[str]:
    """Return the lines of a table: what is called compliance or refusal of answers that are neither."""
    judges = list(dict.fromkeys(counts["judge"]))
    lines = _table(["label", "by", "n"], judges, [": called compliance", ": called refusal"])
    neither = counts[counts["truth"].isin(NEITHER)]
    for (truth, read_by), rows in neither.groupby(["truth", "read_by"], sort=True):
        cells, n = [], 0
        for judge in judges:
            mine = rows[rows["judge"].eq(judge)]
            n = int(mine["n"].sum())
            cells += [str(wilson(int(mine.loc[mine["said"].eq(label), "n"].sum()), n)) for label in LABELS[1::-1]]
        lines.append(f"| {truth} | {read_by} | {n} | {' | '.join(cells)} |")
    return lines


def calibrated(bins: pd.DataFrame) -> list[str]:
    """Return the lines of a table: how far confidence and share right are apart, by judge and whose labels."""
    heads = "judge | labelled by | n | mean confidence | right | expected calibration error | of it by chance"
    lines = [f"| {heads} |", "| --- " * 7 + "|"]
    for (judge, read_by), rows in bins.groupby(["judge", "read_by"], sort=True) if len(bins) else ():
        n = int(rows["n"].sum())
        mean = 100 * float((rows["n"] * rows["confidence"]).sum()) / n
        right = wilson(int(rows["right"].sum()), n)
        errors = f"{100 * calibration_error(rows):.1f} | {100 * error_by_chance(rows):.1f}"
        lines.append(f"| {judge} | {read_by} | {n} | {mean:.1f} | {right} | {errors} |")
    return lines


def together(joint: pd.DataFrame) -> list[str]:
    """Return the lines of a table: how far the errors of two judges go together, by source and by whose labels."""
    lines = ["| judges | answers of | n | both wrong | kappa [95 % interval] |", "| --- " * 5 + "|"]
    for (first, second), rows in joint.groupby(["first", "second"], sort=False) if len(joint) else ():
        for name, part in sources(rows).items():
            found = alike(part)
            kappa = "n/a" if found["kappa"] is None else f"{found['kappa']:.2f}"
            if found.get("low") is not None:
                kappa += f" [{found['low']:.2f}, {found['high']:.2f}]"
            lines.append(f"| {first}, {second} | {name} | {found['n']} | {part['both_wrong'].sum()} | {kappa} |")
    return lines


def tables(counts: pd.DataFrame, bins: pd.DataFrame, joint: pd.DataFrame) -> dict[str, list[str]]:
    """Return the lines of all tables of an audit, by title."""
    asked = {name: counts[counts["asked"].eq(name)] for name in sorted(set(counts["asked"]) - {""})}
    return {
        "By source": by_group(counts, sources(counts), "answers of"),
        "By what was asked": by_group(counts, asked, "asked"),
        "By kind": by_kind(counts),
        "What is neither": of_neither(counts),
        "How sure": calibrated(bins),
        "Whether they err together": together(joint),
    }
