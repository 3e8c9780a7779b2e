"""Summarise recorded runs: one row a method and harmful ratio, means over seeds with intervals."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import mean
from typing import Any

import pandas as pd

from cwac_lab.config import INCIDENTAL
from cwac_lab.results import store
from cwac_lab.results.store import RunFolder
from cwac_lab.stats import wilson

SETTING = ["weights", "weights_content", "task", "data", "split"]
ROW = ["harmful_ratio", "constraint", "variant"]
RATES = {
    "harmful_score": "HS",
    "finetune_accuracy": "FA",
    "over_refusal": "over-refusal",
    "over_refusal_lookalike": "over-refusal (look-alikes)",
    "incoherent": "incoherent",
}
_ORDER = ("start", "none", "weight", "activation", "coupled")
_CONFIGURED = ("constraint", "trainer", "data", "align", "evaluation", "sae")


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {prefix: node}
    return {k: v for key, child in node.items() for k, v in _flat(child, f"{prefix}.{key}".lstrip(".")).items()}


def records(runs: Iterable[RunFolder]) -> list[dict[str, Any]]:
    """Return the metrics of finished runs, each with its flattened configuration under ``config``."""
    found = []
    for run in runs:
        if run.status == "ok":
            metrics, config = run.read(store.METRICS), run.read(store.CONFIG)
            kept = _flat({group: config.get(group) for group in _CONFIGURED})
            idle = _idle(metrics)
            kept = {key: value for key, value in kept.items() if not key.startswith(idle)}
            found.append({**metrics, "config": kept, "run": run})
    return found


def _idle(metrics: dict[str, Any]) -> tuple[str, ...]:
    """Return the settings that a run did not use: rows that differ in them only are one row."""
    prepared = metrics.get("prepared", {})
    idle: tuple[str, ...] = () if "features" in prepared else ("sae.",)
    idle += () if "reference" in prepared else ("data.reference",)
    return (*idle, "constraint.", "trainer.") if metrics["constraint"] == "start" else idle


def _variants(rows: list[dict[str, Any]]) -> list[str]:
    """Name, for each row, the settings in which rows of one constraint differ, so that no two settings share a mean."""
    names = []
    for row in rows:
        peers = [peer["config"] for peer in rows if all(peer[key] == row[key] for key in [*SETTING, "constraint"])]
        keys = [
            key for key in row["config"] if key not in INCIDENTAL and len({repr(peer.get(key)) for peer in peers}) > 1
        ]
        names.append(", ".join(f"{key.removeprefix('constraint.')}={row['config'][key]}" for key in keys))
    return names


def cell(rates: list[dict[str, Any]]) -> str:
    """Return the mean over seeds of one rate, its interval and its spread.

    Seeds are judged on the same prompts, so more seeds do not make the prompts more: the interval is Wilson's at the
    number of prompts of a single run, around the mean over seeds. The range over seeds stands beside it.
    """
    known = [rate for rate in rates if rate["value"] is not None]
    if not known:
        return "n/a (n=0)"
    centre, n = mean(rate["value"] for rate in known), min(rate["n"] for rate in known)
    interval = wilson(centre / 100 * n, n)
    text = f"{centre:.1f} [{interval.low:.1f}, {interval.high:.1f}] (n={n})"
    if len(known) > 1:
        text += f" {min(r['value'] for r in known):.0f}..{max(r['value'] for r in known):.0f}"
    return text


def place(entry: dict[str, Any]) -> tuple[Any, ...]:
    """Return the key that sorts rows of tables: setting, start, then ratio, constraint and variant."""
    order = {name: number for number, name in enumerate(_ORDER)}
    return (
        *(str(entry[key]) for key in SETTING),
        -1.0 if entry["constraint"] == "start" else entry["harmful_ratio"],
        order.get(str(entry["constraint"]), len(order)),
        str(entry["variant"]),
    )


def grouped(rows: list[dict[str, Any]]) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Return what a table has a row of (setting, harmful ratio, constraint, variant), in order, with its runs."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row, variant in zip(rows, _variants(rows), strict=True):
        row["variant"] = variant
        groups.setdefault(tuple(row[key] for key in [*SETTING, *ROW]), []).append(row)
    found = [(dict(zip([*SETTING, *ROW], key, strict=True)), group) for key, group in groups.items()]
    return sorted(found, key=lambda pair: place(pair[0]))


def summary(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Return one row a setting, harmful ratio, constraint and variant; rates as text, seeds counted."""
    table = []
    for entry, group in grouped(rows):
        leaks = [row["leak"] for row in group if row.get("leak") is not None]
        broken = sum(row["broken"] for row in group)
        rates = {title: cell([row[name] for row in group]) for name, title in RATES.items()}
        leak, count = f"{max(leaks):.1e}" if leaks else "", f"{broken} of {len(group)}" if broken else ""
        table.append({**entry, "seeds": len(group), **rates, "leak": leak, "broken": count})
    return pd.DataFrame(table)


def markdown(table: pd.DataFrame, title: str = "") -> str:
    """Return a summary as Markdown: one table a setting, headed by what really ran, without empty columns.

    Args:
        table: One row a setting, ratio, constraint and variant.
        title: Words that open every heading.
    """
    parts = []
    for key, group in table.groupby(SETTING, sort=False):
        weights, content, task, data, split = key
        columns = [name for name in table.columns if name not in SETTING and group[name].ne("").any()]
        lines = [
            f"### {title}{weights} ({str(content)[:8]}) | {task}, {data} data, {split} split",
            "",
            "| " + " | ".join(columns) + " |",
        ]
        lines.append("|" + " --- |" * len(columns))
        for _, row in group.iterrows():
            cells = ["" if pd.isna(row[name]) else f"{row[name]}" for name in columns]
            lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"
