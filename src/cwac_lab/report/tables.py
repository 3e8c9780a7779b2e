"""Tables over recorded runs: one row a method and harmful ratio, means over seeds with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from cwac_lab.core.cache import shortened
from cwac_lab.core.stats import Rate, mean_of, mean_rate
from cwac_lab.data.forms import OWN
from cwac_lab.evaluation.metrics import metric
from cwac_lab.evaluation.verdicts import HARMFULNESS
from cwac_lab.report import costs
from cwac_lab.report.costs import Cost
from cwac_lab.report.grouping import (
    ACROSS_TASKS,
    PLAIN_ATTACK,
    SETTING,
    Row,
    finished,
    grouped,
    has_rate,
)
from cwac_lab.report.layout import LEAK, MEASURES, PLAIN, Layout
from cwac_lab.report.published import PAPER_TASKS, published
from cwac_lab.report.rates import (
    COUNT,
    LOSS,
    MEANS,
    OF,
    UP,
    count_of,
    count_title,
    is_rate,
    known,
    matrix,
    over,
    title,
)

# Rates that a table has even where no run has a value: the cell says why.
MAIN = tuple(map(title, ("harmful_score", "finetune_accuracy")))
_AVERAGED = ("harmful_score", "retained_refusals", "finetune_accuracy")
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

    That of a loss, and of harmfulness, is ``stats.mean_of``.
    """
    if name == LOSS:
        return mean_of([Rate(**row[LOSS]) for row in finished(group) if LOSS in row])
    if name == HARMFULNESS:
        return _cut(mean_of(_harmfulness(finished(group))))
    return over([row["verdicts"] for row in finished(group)], name)


def _cut(rate: Rate) -> Rate:
    """Return a mean with the part of its interval that is within 0 and 100."""
    if rate.low is None or rate.high is None:
        return rate
    return replace(rate, low=max(0.0, rate.low), high=min(100.0, rate.high))


def _harmfulness(rows: list[Row]) -> list[Rate]:
    """Return the harmfulness of runs by the first judge that tells it; none where several judges do."""
    found: dict[tuple[str, str], list[Rate]] = {}
    for row in rows:
        first = next(iter(row["judges"]))
        told = {first: row, **{name: each for name, each in row["judges"].items() if name != first}}
        by = next((name for name, each in told.items() if HARMFULNESS in each), None)
        if by is not None:
            found.setdefault((by, row["judges"][by]["version"]), []).append(Rate(**told[by][HARMFULNESS]))
    return next(iter(found.values())) if len(found) == 1 else []


def _cell(group: list[Row], name: str, found: Rate) -> str:
    """Return a rate of a row as text, mean over seeds and interval, or why there is none.

    A run none of whose answers count has no rate: then it is said how many have one.
    """
    done = finished(group)
    if not done:
        return f"failed: {group[0]['failed']}"
    having = sum(rate_of([row], name).value is not None for row in done) if len(done) > 1 else 0
    of = f", {having} of {len(done)} runs" if 0 < having < len(done) else ""
    return f"{_text(name, found)}{of}"


def _text(name: str, rate: Rate) -> str:
    """Return a rate as text; a loss, which is no percentage, with three decimals."""
    if name != LOSS or rate.value is None:
        return str(rate)
    return f"{rate.value:.3f}" + ("" if rate.low is None else f" [{rate.low:.3f}, {rate.high:.3f}]")


def _row(entry: Row, group: list[Row], columns: Sequence[str], told_costs: Mapping[str, Cost]) -> Row:
    done = finished(group)
    broken = sum(row["broken"] for row in done)
    failed = [row["failed"] for row in group if "failed" in row]
    told: Row = {**entry, "seeds": len(done)}
    for name in columns:
        if name in MEASURES:
            told[name] = MEASURES[name].text(done)
        elif costs.is_cost(name):
            told |= costs.cells(group, [told_costs[name]]) if name in told_costs else {}
        else:
            found = rate_of(group, name)
            told |= {title(name): _cell(group, name, found), count_title(name): found.n if done else ""}
    return {
        **told,
        "broken": f"{broken} of {len(group)}" if broken else "",
        "failed": f"{len(failed)} of {len(group)}: {failed[0]}" if failed and done else "",
    }


def summary(rows: list[Row], experiment: str | None = None, layout: Layout = PLAIN) -> pd.DataFrame:
    """Return one row a setting, harmful ratio, constraint and variant; rates as text, seeds counted.

    Args:
        rows: Records.
        experiment: Name of the table; where the paper has one of that name, its values stand beside ours.
        layout: Which columns, and in which order the rows; by default all, with those of ``MEASURES`` left out but the
            leak.

    Raises:
        ConfigError: If the layout names a suite that no record has.
    """
    named = {cost.name: cost for cost in costs.known(rows)}
    shown = [name for name, cost in named.items() if cost.shown]
    columns = layout.of(rows) or (*known(rows), *MEANS, *shown, LEAK)
    return pd.DataFrame(
        [
            {**_row(entry, group, columns, named), **published(experiment, entry)}
            for entry, group in ordered(rows, layout)
        ]
    )


def ordered(rows: list[Row], layout: Layout = PLAIN) -> list[tuple[Row, list[Row]]]:
    """Return what a table has a row of, with its runs; where the layout sorts, by that column within a setting.

    Rows without a value come last, whatever the direction.
    """
    cells = grouped(rows)
    if layout.sort is None:
        return cells
    valued = [(_value(*cell, layout.key), cell) for cell in cells]
    there = sorted((pair for pair in valued if pair[0] is not None), key=lambda pair: pair[0], reverse=layout.down)
    found = [cell for _, cell in (*there, *(pair for pair in valued if pair[0] is None))]
    return sorted(found, key=lambda cell: [str(cell[0][key]) for key in SETTING])


def _value(entry: Row, group: list[Row], name: str) -> Any:
    """Return what a row is sorted by; None where it has no value."""
    if name in entry:
        return entry[name]
    done = finished(group)
    if name == "seeds":
        return len(done)
    if costs.is_cost(name):
        return next((costs.rate_of(group, cost).value for cost in costs.known(group) if cost.name == name), None)
    return MEASURES[name].of(done) if name in MEASURES else rate_of(group, name).value


def numbers(rows: list[Row], layout: Layout = PLAIN) -> pd.DataFrame:
    """Return the same rows as ``summary`` with one number a cell: of each rate value, bounds, n, and range over seeds.

    Rates under a system prompt are there where any run has them.
    """
    table = []
    named = {cost.name: cost for cost in costs.known(rows)}
    rates = [name for name in (*known(rows), *MEANS) if _is_told(rows, name)]
    columns = layout.of(rows) or (*rates, *named, LEAK)
    for entry, group in ordered(rows, layout):
        done = finished(group)
        row: Row = {**entry, "seeds": len(done), "failed": len(group) - len(done)}
        for name in columns:
            if name in MEASURES:
                row[name] = MEASURES[name].of(done)
            elif costs.is_cost(name):
                row |= costs.numbers(group, [named[name]]) if name in named else {name: None}
            else:
                row |= _in_numbers(group, name)
        table.append({**row, "broken": sum(run["broken"] for run in done)})
    return pd.DataFrame(table)


def _in_numbers(group: list[Row], name: str) -> Row:
    each = [value for one in finished(group) if (value := rate_of([one], name).value) is not None]
    rate = rate_of(group, name)
    return {
        name: rate.value, f"{name}_low": rate.low, f"{name}_high": rate.high, f"{name}_n": rate.n,
        f"{name}_lowest_seed": min(each, default=None), f"{name}_highest_seed": max(each, default=None),
    }  # fmt: skip


def _is_told(rows: list[Row], name: str) -> bool:
    """Tell whether tables have numbers of a rate: always in the prompts' own form, else where any run has them."""
    if name == LOSS:
        return any(LOSS in row for row in rows)
    if name == HARMFULNESS:
        return any(_harmfulness([row]) for row in finished(rows))
    if OF in name:
        return any(name in row for row in rows)
    return metric(name).form == OWN or has_rate(rows, name)


def filled(table: pd.DataFrame, layout: Layout = PLAIN) -> list[str]:
    """Return the columns that say something: not those that are empty, nor rates (and their n) that no row has.

    Rates that are chosen are there all the same.
    """
    rates = [] if layout.columns else [name for name in map(str, table) if is_rate(name) and name not in MAIN]
    without = {name for name in rates if not _values(table[name])}
    silent = {column for name in without for column in (name, count_of(name))}
    return [column for column in table.columns if column not in silent and table[column].ne("").any()]


def averages(rows: list[Row], experiment: str | None = None, layout: Layout = PLAIN) -> pd.DataFrame:
    """Return the means over tasks of HS, retained refusals and FA, where weights were fine-tuned on more than one.

    Where columns are chosen it is those of the three that are among them.

    Tasks weigh alike; the interval draws seeds within each task, and items (the prompts of HS are the same in all).
    """
    table = []
    names = [name for name in layout.of(rows) or _AVERAGED if name in _AVERAGED]
    for entry, group in grouped(rows, ACROSS_TASKS) if names else ():
        tasks: dict[str, list[Row]] = {}
        for row in group:
            tasks.setdefault(row["task"], []).append(row)
        if entry["constraint"] == "start" or len(tasks) < 2:
            continue
        rates: Row = {}
        for name in names:
            rates[title(name)], rates[count_title(name)] = _average(tasks, name)
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
    rate = mean_rate(matrix([row["verdicts"] for row in runs], name), [len(group) for group in counted.values()])
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
        for column in filter(is_rate, map(str, table)):
            values = _values(part[column])
            order = sorted(set(values.values()), reverse=column.endswith(UP))
            places = {row: order.index(value) for row, value in values.items() if len(values) > 1}
            found.setdefault(column, {}).update({row: place for row, place in places.items() if place < 2})
    return found


def _values(cells: pd.Series[Any]) -> dict[Any, float]:
    """Return what the cells of a column say, as printed, without those that are no rate."""
    return {row: float(text.split(" ")[0]) for row, text in cells.items() if text.removeprefix("-")[:1].isdigit()}


def column_title(name: str) -> str:
    """Return a column's name as it is shown: a bare n stands after the rate that it belongs to."""
    return "n" if name.startswith(COUNT) else name


def heading(entry: Any) -> str:
    """Return one line that says what really ran: weights, task, data and prompts by content, dealing, split, judge."""
    rows = f"{entry['task_rows']}, " if "task_rows" in entry else ""
    data = f"{entry['data']} data ({rows}{entry['prompts']})"
    attack = "" if entry["attack"] == PLAIN_ATTACK else f", attack {entry['attack']}"
    weights = f"{entry['weights']} ({shortened(str(entry['weights_content']))})"
    return (
        f"{weights} | {entry['task']}, {data}, {entry['split']} split{attack}, {DEALT[entry['dealt']]}, "
        f"judged by {entry['judge']}"
    )


def markdown(table: pd.DataFrame, words: str = "", caption: str = CAPTION, layout: Layout = PLAIN) -> str:
    """Return a summary as Markdown: one table a setting, headed by what really ran, without empty columns.

    Args:
        table: One row a setting, ratio, constraint and variant.
        words: Words that open every heading.
        caption: What stands under every heading: what is shown, its direction, n.
        layout: That of the summary.
    """
    parts = []
    setting = [name for name in SETTING if name in table.columns]
    best = ranked(table) if "broken" in table else {}
    for _, group in table.groupby(setting, sort=False):
        columns = [name for name in filled(group, layout) if name not in setting]
        lines = [f"### {words}{heading(group.iloc[0])}", "", caption, ""]
        lines += ["| " + " | ".join(map(column_title, columns)) + " |", "|" + " --- |" * len(columns)]
        for at, row in group.iterrows():
            cells = ["" if pd.isna(row[name]) else f"{row[name]}".replace("|", "\\|") for name in columns]
            first = [best.get(name, {}).get(at) == 0 for name in columns]
            marked = [f"**{cell}**" if bold else cell for cell, bold in zip(cells, first, strict=True)]
            lines.append("| " + " | ".join(marked) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"
