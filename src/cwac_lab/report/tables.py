"""Tables over recorded runs: one row a method and harmful ratio, means over seeds with intervals."""

from __future__ import annotations

from typing import Any

import pandas as pd

from cwac_lab.report.published import published
from cwac_lab.report.records import HIGHER_IS_BETTER, RATES, SETTING, Row, grouped, outcome_matrix
from cwac_lab.stats import Rate, mean_rate

TITLES = {name: f"{title} {'↑' if name in HIGHER_IS_BETTER else '↓'}" for name, title in RATES.items()}


def finished(group: list[Row]) -> list[Row]:
    """Return the runs of a row that have figures."""
    return [row for row in group if "failed" not in row]


def rate_of(group: list[Row], name: str) -> Rate:
    """Return the mean of a rate over the finished runs of a row, with its interval (see ``stats.mean_rate``)."""
    return mean_rate(outcome_matrix(finished(group), name))


def cell(group: list[Row], name: str) -> str:
    """Return a rate as text: mean over seeds, interval, n, and the range over seeds; or why there is none."""
    done = finished(group)
    if not done:
        return f"failed: {group[0]['failed']}"
    values = [row[name]["value"] for row in done if row[name]["value"] is not None]
    spread = f" {min(values):.0f}..{max(values):.0f}" if len(values) > 1 else ""
    return f"{rate_of(group, name)}{spread}"


def _row(entry: Row, group: list[Row]) -> Row:
    done = finished(group)
    leaks = [row["leak"] for row in done if row.get("leak") is not None]
    broken = sum(row["broken"] for row in done)
    failed = [row["failed"] for row in group if "failed" in row]
    return {
        **entry,
        "seeds": len(done),
        **{title: cell(group, name) for name, title in TITLES.items()},
        "leak": f"{max(leaks):.1e}" if leaks else "",
        "broken": f"{broken} of {len(group)}" if broken else "",
        "failed": f"{len(failed)} of {len(group)}: {failed[0]}" if failed and done else "",
    }


def summary(rows: list[Row], experiment: str | None = None) -> pd.DataFrame:
    """Return one row a setting, harmful ratio, constraint and variant; rates as text, seeds counted.

    Args:
        rows: Records.
        experiment: Name of the table; where the paper has one of that name, its values stand beside ours.
    """
    return pd.DataFrame(
        [{**_row(entry, group), **published(experiment, entry)} for entry, group in grouped(rows)]
    )  # fmt: skip


def averages(rows: list[Row], experiment: str | None = None) -> pd.DataFrame:
    """Return the means over tasks of HS and FA, where the same weights were fine-tuned on more than one.

    Tasks weigh alike; the interval draws seeds within each task, and items (the prompts of HS are the same in all).
    """
    across: dict[tuple[Any, ...], list[tuple[Row, list[Row]]]] = {}
    for entry, group in grouped(rows):
        if entry["constraint"] != "start" and finished(group):
            key = tuple(value for name, value in entry.items() if name != "task")
            across.setdefault(key, []).append((entry, finished(group)))
    table = []
    for parts in across.values():
        if len(parts) > 1:
            entry = {**parts[0][0], "task": "average"}
            tasks = ", ".join(sorted(part["task"] for part, _ in parts))
            rates = {TITLES[name]: _average(parts, name) for name in ("harmful_score", "finetune_accuracy")}
            runs = sum(len(group) for _, group in parts)
            table.append({**entry, "tasks": tasks, "runs": runs, **rates, **published(experiment, entry)})
    return pd.DataFrame(table)


def _average(parts: list[tuple[Row, list[Row]]], name: str) -> str:
    """Return the mean over the tasks that are scored; named where they are not all."""
    scored = [(entry["task"], group) for entry, group in parts if rate_of(group, name).n]
    if not scored:
        return str(Rate(None, None, None, 0))
    runs = [row for _, group in scored for row in group]
    text = str(mean_rate(outcome_matrix(runs, name), [len(group) for _, group in scored]))
    return text if len(scored) == len(parts) else f"{text}, {' and '.join(sorted(task for task, _ in scored))} only"


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
            cells = ["" if pd.isna(row[name]) else f"{row[name]}".replace("|", "\\|") for name in columns]
            lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"
