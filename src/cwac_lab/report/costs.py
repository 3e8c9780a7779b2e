"""What a method costs beside its rates, declared: how tables call it, its unit and direction, how a record tells it.

``known`` are the costs that some runs tell. Those that are ``shown`` stand in every table that has them, the others
where they are asked for by name; ``numbers`` has all. A new cost is one entry of ``_COSTS``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from cwac_lab.core.stats import Rate, mean_of
from cwac_lab.report.grouping import Row, finished


@dataclass(frozen=True)
class Cost:
    """A figure of a run that is no rate of answers.

    Attributes:
        name: Its name among columns.
        heading: How tables call it.
        unit: Its unit; empty for what has none.
        better: ``lower`` or ``higher``; empty for what is neither.
        digits: Decimals that are shown.
        read: Returns it from a record's ``Metrics``, with interval and n where it has them; None where it is not told.
        of: Returns what it was measured on: figures of different things are not averaged.
        shown: Whether tables and the screen have it unasked.
        absent: What tables say where it was measured and has no value.
    """

    name: str
    heading: str
    unit: str
    better: str
    digits: int
    read: Callable[[Row], Rate | None]
    of: Callable[[Row], Any] = lambda row: None
    shown: bool = False
    absent: str = "n/a"

    @property
    def title(self) -> str:
        """Its heading with unit and direction."""
        arrow = {"lower": " ↓", "higher": " ↑"}.get(self.better, "")
        return f"{self.heading}{f', {self.unit}' if self.unit else ''}{arrow}"

    @property
    def count(self) -> str:
        """The column after it: on how many documents it is."""
        return f"n, {self.title.removesuffix(' ↓').removesuffix(' ↑')}"


def _interval(name: str) -> Callable[[Row], Rate | None]:
    """Return a reader of a field with value, interval and n."""
    return lambda row: _rate(row[name]) if name in row else None


def _rate(told: dict[str, Any]) -> Rate:
    return Rate(told["value"], told["low"], told["high"], told["n"])


def _plain(value: float | None) -> Rate | None:
    return None if value is None else Rate(float(value), None, None, 1)


def _seconds(row: Row, *stages: str) -> Rate | None:
    """Return the seconds of some stages, of all by default."""
    spent = [stage["seconds"] for name, stage in row.get("stages", {}).items() if not stages or name in stages]
    return _plain(sum(spent)) if spent else None


def _peak(name: str) -> Callable[[Row], Rate | None]:
    """Return a reader of the highest value that any stage has of a field."""

    def read(row: Row) -> Rate | None:
        return _plain(max((stage[name] for stage in row.get("stages", {}).values() if name in stage), default=None))

    return read


def _half_lost(row: Row) -> Rate | None:
    """Return it with its interval, where both ends are within the run."""
    if "half_lost" not in row:
        return None
    told = row["half_lost"]
    within = None not in (told["low"], told["high"])
    return Rate(told["value"], told["low"] if within else None, told["high"] if within else None, told["n"])


def _text(row: Row) -> Any:
    return row.get("plain_text")


_COSTS = (
    Cost("perplexity", "perplexity, plain text", "", "lower", 1, _interval("perplexity"), _text, shown=True),
    Cost("perplexity_start", "the start's perplexity, plain text", "", "", 1, _interval("perplexity_start"), _text),
    Cost("forgetting", "forgetting", "nats a token", "lower", 3, _interval("forgetting"), _text, shown=True),
    Cost(
        "half_lost", "steps to half of the refusals lost", "", "higher", 0, _half_lost,
        lambda row: row["half_lost"]["steps"] if "half_lost" in row else None, shown=True, absent="not within the run",
    ),
    Cost("seconds", "time", "s", "lower", 0, _seconds),
    Cost("train_seconds", "time of training", "s", "lower", 0, lambda row: _seconds(row, "train")),
    Cost("peak_memory_gb", "peak memory", "GB", "lower", 2, _peak("peak_memory_gb")),
    Cost("peak_gpu_memory_gb", "peak memory of the GPU", "GB", "lower", 2, _peak("peak_gpu_memory_gb")),
    Cost(
        "trained_parameters", "trained parameters", "", "lower", 0,
        lambda row: _plain(row.get("training", {}).get("trained_parameters")),
    ),
    Cost(
        "held_share", "held of unseen harmful prompts", "of 1", "higher", 3, lambda row: _plain(row.get("held_share"))
    ),
)  # fmt: skip


COSTS = tuple(cost.name for cost in _COSTS)
# What the names of tasks of the harness begin with, and those of win rates.
_TASK, _WIN = "lm_eval_", "win_rate_over_"


def is_cost(name: str) -> bool:
    """Tell whether a column is a cost by its name, whether or not any record tells it."""
    return name in COSTS or name.startswith((_TASK, _WIN))


def _tasks(row: Row) -> Iterator[Cost]:
    """Yield the first metric of each task of lm-evaluation-harness that a record tells."""
    for task, metrics in row.get("lm_eval", {}).get("tasks", {}).items():
        metric, told = next(iter(metrics.items()))

        def read(row: Row, task: str = task, metric: str = metric) -> Rate | None:
            found = row.get("lm_eval", {}).get("tasks", {}).get(task, {}).get(metric)
            return None if found is None else _rate(found)

        def by(row: Row, task: str = task, metric: str = metric) -> Any:
            return _harness(row, task, metric)

        digits = 1 if told["unit"] else 3
        heading = f"{task} ({metric})"
        yield Cost(f"{_TASK}{task}", heading, told["unit"], told["better"], digits, read, by, shown=True)


def _wins(row: Row) -> Iterator[Cost]:
    """Yield the win rate over each other method that a record tells."""
    for method in row.get("win_rates", {}):

        def told(row: Row, method: str = method) -> dict[str, Any]:
            return dict(row.get("win_rates", {}).get(method, {}))

        def read(row: Row, told: Callable[[Row], dict[str, Any]] = told) -> Rate | None:
            return _rate(found) if (found := told(row)) else None

        def by(row: Row, told: Callable[[Row], dict[str, Any]] = told) -> Any:
            return told(row).get("judge"), told(row).get("setting")

        name = f"{_WIN}{method.replace(' ', '_')}"
        yield Cost(name, f"win rate over {method}", "%", "higher", 1, read, by, shown=True)


def _harness(row: Row, task: str, metric: str) -> Any:
    """Return what a metric was measured by; its unit too, as earlier records had F1 in percent."""
    told = row.get("lm_eval", {})
    unit = told.get("tasks", {}).get(task, {}).get(metric, {}).get("unit")
    return told.get("version"), told.get("limit"), unit


def known(rows: list[Row]) -> list[Cost]:
    """Return the costs that any finished run of some tells, in the order of columns."""
    done = finished(rows)
    named = {cost.name: cost for row in done for cost in (*_wins(row), *_tasks(row))}
    return [cost for cost in (*_COSTS, *named.values()) if any(cost.read(row) is not None for row in done)]


def _told(group: list[Row], cost: Cost) -> list[Row]:
    return [row for row in finished(group) if cost.read(row) is not None]


def rate_of(group: list[Row], cost: Cost) -> Rate:
    """Return the mean of a cost over the runs of a row (see ``stats.mean_of``).

    It has no value where no run tells it, where any says that there is none, or where runs were measured on different
    things. Only what has an interval within a run has one here.
    """
    rows = _told(group, cost)
    if len({str(cost.of(row)) for row in rows}) != 1:
        return Rate(None, None, None, 0)
    found = [rate for row in rows if (rate := cost.read(row)) is not None]
    if any(rate.value is None for rate in found):  # the mean of the others would be of some seeds only
        return Rate(None, None, None, 0)
    mean = mean_of(found)
    if all(rate.low is None for rate in found):
        return Rate(mean.value, None, None, mean.n)
    if cost.unit == "%" and mean.low is not None and mean.high is not None:
        return Rate(mean.value, max(0.0, mean.low), min(100.0, mean.high), mean.n)
    return mean


def text(group: list[Row], cost: Cost) -> str:
    """Return a cost as text: mean over seeds, and interval or range; words where runs cannot be averaged."""
    rows = _told(group, cost)
    if (several := len({str(cost.of(row)) for row in rows})) > 1:
        return f"n/a (measured on {several} different things)"
    rate = rate_of(group, cost)
    if rate.value is None:
        having = sum(told is not None and told.value is not None for told in map(cost.read, rows))
        return f"{cost.absent}{f', {len(rows) - having} of {len(rows)} runs' if having else ''}" if rows else ""
    shown = f"{rate.value:.{cost.digits}f}"
    if rate.low is not None and rate.high is not None:
        return f"{shown} [{rate.low:.{cost.digits}f}, {rate.high:.{cost.digits}f}]"
    ends = [f"{end:.{cost.digits}f}" for end in _range(group, cost) if end is not None]
    return shown if len(set(ends)) < 2 else f"{shown} ({' to '.join(ends)})"


def _range(group: list[Row], cost: Cost) -> tuple[float | None, float | None]:
    """Return the lowest and the highest value over seeds."""
    values = [rate.value for row in _told(group, cost) if (rate := cost.read(row)) and rate.value is not None]
    return min(values, default=None), max(values, default=None)


def cells(group: list[Row], costs: list[Cost]) -> Row:
    """Return the columns of costs in a table: each as text, and n after those that have an interval."""
    found: Row = {}
    for cost in costs:
        rate = rate_of(group, cost)
        found[cost.title] = text(group, cost)
        found[cost.count] = rate.n if rate.low is not None else ""
    return found


def numbers(group: list[Row], costs: list[Cost]) -> Row:
    """Return costs as numbers: mean over seeds, lowest and highest seed; bounds and n where there is an interval."""
    found: Row = {}
    for cost in costs:
        rate, (lowest, highest) = rate_of(group, cost), _range(group, cost)
        found |= {cost.name: rate.value, f"{cost.name}_lowest_seed": lowest, f"{cost.name}_highest_seed": highest}
        if any(told.low is not None for row in _told(group, cost) if (told := cost.read(row))):
            found |= {f"{cost.name}_low": rate.low, f"{cost.name}_high": rate.high, f"{cost.name}_n": rate.n}
    return found


def lines(metrics: Row) -> list[tuple[str, str, str]]:
    """Return what the screen and a model card tell of one run: name, value with interval, and n, of what is shown."""
    told = [cost for cost in known([metrics]) if cost.shown or cost.name == "perplexity_start"]
    return [(cost.title, text([metrics], cost), str(rate_of([metrics], cost).n)) for cost in told]
