"""Tables over recorded runs: one row a method and harmful ratio, means over seeds with intervals."""

from __future__ import annotations

from typing import Any

import pandas as pd

from cwac_lab.core.stats import Rate, mean_rate
from cwac_lab.evaluation.metrics import SHOWN
from cwac_lab.report.published import PAPER_TASKS, published
from cwac_lab.report.records import (
    ACROSS_TASKS,
    PLAIN_ATTACK,
    SETTING,
    Row,
    finished,
    grouped,
    outcome_matrix,
)

TITLES = {name: f"{metric.heading} {metric.arrow}" for name, metric in SHOWN.items()}

# What no two pools of prompts share, by the rule that they were dealt by (``data.near``).
DEALT = {
    "exact": "prompts dealt by exact text",
    "ngram": "prompts dealt by 5-gram groups",
    "embedding": "prompts dealt by 5-gram and embedding groups",
}


def rate_of(group: list[Row], name: str) -> Rate:
    """Return the mean of a rate over the finished runs of a row, with its interval (see ``stats.mean_rate``)."""
    return mean_rate(outcome_matrix(finished(group), name))


def cell(group: list[Row], name: str) -> str:
    """Return a rate as text: mean over seeds, interval, n, and the range over seeds; or why there is none.

    A run none of whose answers count has no rate: then it is said how many have one.
    """
    done = finished(group)
    if not done:
        return f"failed: {group[0]['failed']}"
    each = [rate_of([row], name).value for row in done]
    values = [value for value in each if value is not None]
    spread = f" {min(values):.0f}..{max(values):.0f}" if len(values) > 1 else ""
    of = f", {len(values)} of {len(done)} runs" if values and len(values) < len(done) else ""
    return f"{rate_of(group, name)}{spread}{of}"


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
    table = []
    for entry, group in grouped(rows, ACROSS_TASKS):
        tasks: dict[str, list[Row]] = {}
        for row in group:
            tasks.setdefault(row["task"], []).append(row)
        if entry["constraint"] == "start" or len(tasks) < 2:
            continue
        rates = {TITLES[name]: _average(tasks, name) for name in ("harmful_score", "finetune_accuracy")}
        beside = published(experiment, {**entry, "task": "average"}) if set(tasks) == PAPER_TASKS else {}
        names = ", ".join(sorted(tasks))
        table.append({**entry, "task": f"mean of {names}", "runs": len(finished(group)), **rates, **beside})
    return pd.DataFrame(table)


def _average(tasks: dict[str, list[Row]], name: str) -> str:
    """Return the mean over tasks; accuracy over those that are scored, and named where they are not all."""
    twofold = [task for task, group in sorted(tasks.items()) if len({row["task_rows"] for row in group}) > 1]
    if twofold:
        return f"n/a ({', '.join(twofold)} with more than one set of rows)"
    without = sorted(task for task, group in tasks.items() if not rate_of(group, name).n)
    unscored = [task for task in without if name == "finetune_accuracy" and finished(tasks[task])]
    if set(without) - set(unscored) or len(unscored) == len(tasks):
        return f"n/a ({', '.join(without)})"
    counted = {task: finished(group) for task, group in sorted(tasks.items()) if task not in unscored}
    runs = [row for group in counted.values() for row in group]
    text = str(mean_rate(outcome_matrix(runs, name), [len(group) for group in counted.values()]))
    return f"{text}, {' and '.join(counted)} only" if unscored else text


def heading(entry: Any) -> str:
    """Return one line that says what really ran: weights, task, data and prompts by content, dealing, split, judge."""
    rows = f"{entry['task_rows']}, " if "task_rows" in entry else ""
    data = f"{entry['data']} data ({rows}{entry['prompts']})"
    attack = "" if entry["attack"] == PLAIN_ATTACK else f", attack {entry['attack']}"
    weights = f"{entry['weights']} ({str(entry['weights_content'])[:8]})"
    return (
        f"{weights} | {entry['task']}, {data}, {entry['split']} split{attack}, {DEALT[entry['dealt']]}, "
        f"judged by {entry['judge']}"
    )


def markdown(table: pd.DataFrame, title: str = "") -> str:
    """Return a summary as Markdown: one table a setting, headed by what really ran, without empty columns.

    Args:
        table: One row a setting, ratio, constraint and variant.
        title: Words that open every heading.
    """
    parts = []
    setting = [name for name in SETTING if name in table.columns]
    for _, group in table.groupby(setting, sort=False):
        columns = [name for name in table.columns if name not in setting and group[name].ne("").any()]
        lines = [f"### {title}{heading(group.iloc[0])}", "", "| " + " | ".join(columns) + " |"]
        lines.append("|" + " --- |" * len(columns))
        for _, row in group.iterrows():
            cells = ["" if pd.isna(row[name]) else f"{row[name]}".replace("|", "\\|") for name in columns]
            lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"
