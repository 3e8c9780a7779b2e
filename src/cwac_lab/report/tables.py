"""Tables over recorded runs: one row a method and harmful ratio, means over seeds with intervals."""

from __future__ import annotations

from typing import Any

import pandas as pd

from cwac_lab.core.stats import Rate, mean_of, mean_rate
from cwac_lab.data.forms import OWN
from cwac_lab.evaluation.metrics import SHOWN
from cwac_lab.report import costs
from cwac_lab.report.costs import Cost
from cwac_lab.report.grouping import (
    ACROSS_TASKS,
    HIGHER_IS_BETTER,
    PLAIN_ATTACK,
    SETTING,
    Row,
    finished,
    grouped,
    has_rate,
    outcome_matrix,
)
from cwac_lab.report.published import PAPER_TASKS, published

TITLES = {name: f"{metric.heading} {metric.arrow}" for name, metric in SHOWN.items()}
# The column after each rate: on how many prompts or rows it is.
COUNTS = {name: f"n, {metric.heading}" for name, metric in SHOWN.items()}
# Where answers are more than a label: a mean in nats, no share of rows.
LOSS = "held_out_loss"
TITLES[LOSS], COUNTS[LOSS] = "loss on held-out answers, nats ↓", "n, loss on held-out answers"
# Rates that a table has even where no run has a value: the cell says why.
MAIN = ("harmful_score", "finetune_accuracy")
CAPTION = (
    "Percent: mean over seeds [95 % interval]. ↓ lower is better, ↑ higher is better; bold is best at its harmful "
    "ratio, the start and broken models left out. n: prompts or rows that count for the rate before it."
)

# What no two pools of prompts share, by the rule that they were dealt by (``data.near``).
DEALT = {
    "exact": "prompts dealt by exact text",
    "ngram": "prompts dealt by 5-gram groups",
    "embedding": "prompts dealt by 5-gram and embedding groups",
}


def rate_of(group: list[Row], name: str) -> Rate:
    """Return the mean of a rate over the finished runs of a row, with its interval (see ``stats.mean_rate``).

    That of a loss is ``stats.mean_of``.
    """
    if name == LOSS:
        return mean_of([Rate(**row[LOSS]) for row in finished(group) if LOSS in row])
    return mean_rate(outcome_matrix(finished(group), name))


def cell(group: list[Row], name: str) -> str:
    """Return a rate as text, mean over seeds and interval, or why there is none.

    A run none of whose answers count has no rate: then it is said how many have one.
    """
    done = finished(group)
    if not done:
        return f"failed: {group[0]['failed']}"
    having = sum(rate_of([row], name).value is not None for row in done)
    of = f", {having} of {len(done)} runs" if 0 < having < len(done) else ""
    return f"{_text(name, rate_of(group, name))}{of}"


def _text(name: str, rate: Rate) -> str:
    """Return a rate as text; a loss, which is no percentage, with three decimals."""
    if name != LOSS or rate.value is None:
        return str(rate)
    return f"{rate.value:.3f}" + ("" if rate.low is None else f" [{rate.low:.3f}, {rate.high:.3f}]")


def _count(group: list[Row], name: str) -> int | str:
    return rate_of(group, name).n if finished(group) else ""


def _row(entry: Row, group: list[Row], beside: list[Cost]) -> Row:
    done = finished(group)
    leaks = [row["leak"] for row in done if row.get("leak") is not None]
    broken = sum(row["broken"] for row in done)
    failed = [row["failed"] for row in group if "failed" in row]
    return {
        **entry,
        "seeds": len(done),
        **{
            column: value
            for name, title in TITLES.items()
            for column, value in ((title, cell(group, name)), (COUNTS[name], _count(group, name)))
        },
        **costs.cells(group, beside),
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
    beside = [cost for cost in costs.known(rows) if cost.shown]
    return pd.DataFrame(
        [{**_row(entry, group, beside), **published(experiment, entry)} for entry, group in grouped(rows)]
    )


def numbers(rows: list[Row]) -> pd.DataFrame:
    """Return the same rows as ``summary`` in numbers: of each rate value, bounds, n, and the range over seeds.

    Rates under a system prompt are there where any run has them.
    """
    table = []
    known = [name for name in TITLES if _is_told(rows, name)]
    for entry, group in grouped(rows):
        done = finished(group)
        row: Row = {**entry, "seeds": len(done), "failed": len(group) - len(done)}
        for name in known:
            each = [value for one in done if (value := rate_of([one], name).value) is not None]
            rate = rate_of(group, name)
            row |= {name: rate.value, f"{name}_low": rate.low, f"{name}_high": rate.high, f"{name}_n": rate.n}
            row |= {f"{name}_lowest_seed": min(each, default=None), f"{name}_highest_seed": max(each, default=None)}
        leaks = [run["leak"] for run in done if run.get("leak") is not None]
        row |= {"leak": max(leaks, default=None), "broken": sum(run["broken"] for run in done)}
        table.append(row | costs.numbers(group, costs.known(rows)))
    return pd.DataFrame(table)


def _is_told(rows: list[Row], name: str) -> bool:
    """Tell whether tables have numbers of a rate: always in the prompts' own form, else where any run has them."""
    if name == LOSS:
        return any(LOSS in row for row in rows)
    return SHOWN[name].form == OWN or has_rate(rows, name)


def filled(table: pd.DataFrame) -> list[str]:
    """Return the columns that say something: not those that are empty, nor rates (and their n) that no row has."""
    rates = [name for name, title in TITLES.items() if title in table and name not in MAIN]
    without = {name for name in rates if not _values(table[TITLES[name]])}
    silent = {column for name in without for column in (TITLES[name], COUNTS[name])}
    return [column for column in table.columns if column not in silent and table[column].ne("").any()]


def averages(rows: list[Row], experiment: str | None = None) -> pd.DataFrame:
    """Return the means over tasks of HS, retained refusals and FA, where weights were fine-tuned on more than one.

    Tasks weigh alike; the interval draws seeds within each task, and items (the prompts of HS are the same in all).
    """
    table = []
    for entry, group in grouped(rows, ACROSS_TASKS):
        tasks: dict[str, list[Row]] = {}
        for row in group:
            tasks.setdefault(row["task"], []).append(row)
        if entry["constraint"] == "start" or len(tasks) < 2:
            continue
        rates: Row = {}
        for name in ("harmful_score", "retained_refusals", "finetune_accuracy"):
            rates[TITLES[name]], rates[COUNTS[name]] = _average(tasks, name)
        beside = published(experiment, {**entry, "task": "average"}) if set(tasks) == PAPER_TASKS else {}
        broken = sum(row["broken"] for row in finished(group))
        told = {"runs": len(finished(group)), **rates, "broken": f"{broken} of {len(group)}" if broken else ""}
        table.append({**entry, "task": f"mean of {', '.join(sorted(tasks))}", **told, **beside})
    return pd.DataFrame(table)


def _average(tasks: dict[str, list[Row]], name: str) -> tuple[str, int | str]:
    """Return the mean over tasks and its n; accuracy over those that are scored, and named where they are not all."""
    twofold = [task for task, group in sorted(tasks.items()) if len({row["task_rows"] for row in group}) > 1]
    if twofold:
        return f"n/a ({', '.join(twofold)} with more than one set of rows)", ""
    without = sorted(task for task, group in tasks.items() if not rate_of(group, name).n)
    unscored = [task for task in without if name == "finetune_accuracy" and finished(tasks[task])]
    if set(without) - set(unscored) or len(unscored) == len(tasks):
        return f"n/a ({', '.join(without)})", ""
    counted = {task: finished(group) for task, group in sorted(tasks.items()) if task not in unscored}
    runs = [row for group in counted.values() for row in group]
    rate = mean_rate(outcome_matrix(runs, name), [len(group) for group in counted.values()])
    return f"{rate}, {' and '.join(counted)} only" if unscored else str(rate), rate.n


def ranked(table: pd.DataFrame) -> dict[str, dict[Any, int]]:
    """Return by column which rows of a summary hold its best (0) and second-best (1) value at their harmful ratio.

    Starts, which are no method, and broken models, whose rates mean nothing, take no part; where only one row does,
    nothing is ranked. Values are equal that are printed alike.
    """
    found: dict[str, dict[Any, int]] = {}
    if table.empty:
        return found
    for _, part in table.groupby([*(key for key in SETTING if key in table), "harmful_ratio"], dropna=False):
        part = part[part["constraint"].ne("start") & part["broken"].eq("")]
        for name, title in TITLES.items():
            values = _values(part[title]) if title in part else {}
            order = sorted(set(values.values()), reverse=name in HIGHER_IS_BETTER)
            places = {row: order.index(value) for row, value in values.items() if len(values) > 1}
            found.setdefault(title, {}).update({row: place for row, place in places.items() if place < 2})
    return found


def _values(cells: pd.Series[Any]) -> dict[Any, float]:
    """Return what the cells of a column say, as printed, without those that are no rate."""
    return {row: float(text.split(" ")[0]) for row, text in cells.items() if text[:1].isdigit()}


def column_title(name: str) -> str:
    """Return a column's name as it is shown: a bare n stands after the rate that it belongs to."""
    return "n" if name.startswith("n, ") else name


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


def markdown(table: pd.DataFrame, title: str = "", caption: str = CAPTION) -> str:
    """Return a summary as Markdown: one table a setting, headed by what really ran, without empty columns.

    Args:
        table: One row a setting, ratio, constraint and variant.
        title: Words that open every heading.
        caption: What stands under every heading: what is shown, its direction, n.
    """
    parts = []
    setting = [name for name in SETTING if name in table.columns]
    best = ranked(table) if "broken" in table else {}
    for _, group in table.groupby(setting, sort=False):
        columns = [name for name in filled(group) if name not in setting]
        lines = [f"### {title}{heading(group.iloc[0])}", "", caption, ""]
        lines += ["| " + " | ".join(map(column_title, columns)) + " |", "|" + " --- |" * len(columns)]
        for at, row in group.iterrows():
            cells = ["" if pd.isna(row[name]) else f"{row[name]}".replace("|", "\\|") for name in columns]
            first = [best.get(name, {}).get(at) == 0 for name in columns]
            marked = [f"**{cell}**" if bold else cell for cell, bold in zip(cells, first, strict=True)]
            lines.append("| " + " | ".join(marked) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"
