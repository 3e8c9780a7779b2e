"""Records of runs, grouped into the rows of tables; read from the store only."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from jaxtyping import Float

from cwac_lab.config import INCIDENTAL
from cwac_lab.errors import LabError
from cwac_lab.evaluation.verdicts import outcomes
from cwac_lab.results import store
from cwac_lab.results.store import RunFolder

Row = dict[str, Any]
SETTING = ["weights", "weights_content", "task", "data", "split"]
ROW = ["harmful_ratio", "constraint", "variant"]
RATES = {
    "harmful_score": "HS",
    "finetune_accuracy": "FA",
    "over_refusal": "over-refusal",
    "over_refusal_lookalike": "over-refusal (look-alikes)",
    "incoherent": "incoherent",
}
HIGHER_IS_BETTER = {"finetune_accuracy"}
_ORDER = ("start", "none", "weight", "activation", "coupled")
_CONFIGURED = ("constraint", "trainer", "data", "align", "evaluation", "sae")


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {prefix: node}
    return {k: v for key, child in node.items() for k, v in _flat(child, f"{prefix}.{key}".lstrip(".")).items()}


def records(runs: Iterable[RunFolder], say: Callable[[str], None] = print) -> list[Row]:
    """Return one row a run that ended: its facts, its flattened configuration under ``config``, and its folder.

    A finished run has its metrics; a failed one has ``failed``, the reason, instead. Runs that are under way, were
    interrupted, or failed before they had weights are left out.

    Args:
        runs: Run folders.
        say: Told of every record that cannot be read; the others count all the same.
    """
    found = []
    for run in runs:
        try:
            status = run.status
            if status == "ok" or (status == "failed" and run.has(store.PROVENANCE)):
                failed = {"failed": run.told().get("reason", "no reason given")} if status == "failed" else {}
                found.append({**run.facts(), **failed, "run": run})
        except LabError as error:
            say(f"left out: {error}")
    for row in found:
        config = row["run"].read(store.CONFIG)
        kept = _flat({group: config.get(group) for group in _CONFIGURED})
        row["config"] = {key: value for key, value in kept.items() if not key.startswith(_idle(row))}
    return found


def _idle(facts: Row) -> tuple[str, ...]:
    """Return the settings that a run did not use: rows that differ in them only are one row."""
    prepared = facts.get("prepared", {})
    idle: tuple[str, ...] = () if "features" in prepared else ("sae.",)
    idle += () if "reference" in prepared else ("data.reference",)
    return (*idle, "constraint.", "trainer.") if facts["constraint"] == "start" else idle


def _varied(rows: list[Row]) -> list[dict[str, Any]]:
    """Return, for each row, its values of the settings in which rows of its constraint differ."""
    found = []
    for row in rows:
        peers = [peer["config"] for peer in rows if all(peer[key] == row[key] for key in [*SETTING, "constraint"])]
        keys = [key for key in row["config"] if key not in INCIDENTAL and _differs(peers, key)]
        found.append({key.removeprefix("constraint."): row["config"][key] for key in keys})
    return found


def _differs(configs: list[dict[str, Any]], key: str) -> bool:
    first = configs[0].get(key)
    return any(config.get(key) != first for config in configs)


def place(entry: Row) -> tuple[Any, ...]:
    """Return the key that sorts rows of tables: setting, start, then ratio, constraint and variant."""
    order = {name: number for number, name in enumerate(_ORDER)}
    return (
        *(str(entry[key]) for key in SETTING),
        -1.0 if entry["constraint"] == "start" else entry["harmful_ratio"],
        order.get(str(entry["constraint"]), len(order)),
        str(entry["constraint"]),
        str(entry["variant"]),
    )


def grouped(rows: list[Row]) -> list[tuple[Row, list[Row]]]:
    """Return what a table has a row of (setting, harmful ratio, constraint, variant), in order, with its runs.

    No two settings of a constraint share a row: ``variant`` names those that differ. Every run is told its ``variant``,
    and as ``varied`` its values of them.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row, varied in zip(rows, _varied(rows), strict=True):
        row["varied"] = varied
        row["variant"] = ", ".join(f"{key}={value}" for key, value in varied.items())
        groups.setdefault(tuple(row[key] for key in [*SETTING, *ROW]), []).append(row)
    found = [(dict(zip([*SETTING, *ROW], key, strict=True)), group) for key, group in groups.items()]
    return sorted(found, key=lambda pair: place(pair[0]))


def counted(row: Row, rate: str) -> dict[tuple[str, str], bool]:
    """Return the outcome of every item that counts for a rate of a run (see ``verdicts.outcomes``); read once."""
    if "verdicts" not in row:
        row["verdicts"] = row["run"].read(store.VERDICTS) if row["run"].has(store.VERDICTS) else []
    return outcomes(row["verdicts"], rate)


def outcome_matrix(rows: list[Row], rate: str) -> Float[np.ndarray, "S N"]:
    """Return the outcomes of S runs on the N items that count in any of them; NaN where an item does not count."""
    found = [counted(row, rate) for row in rows]
    items = sorted(set().union(*found))
    return np.array([[float(known.get(item, np.nan)) for item in items] for known in found]).reshape(len(rows), -1)
