"""Which columns a table has, and in which order its rows come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, ListConfig

from cwac_lab.core.errors import ConfigError
from cwac_lab.evaluation.metrics import METRICS
from cwac_lab.report.costs import COSTS, is_cost
from cwac_lab.report.rates import MEANS, OF, checked, means_of

Row = dict[str, Any]
LEAK = "leak"
# Columns that a table has in any case, and that its rows may be sorted by.
_ALWAYS = ("harmful_ratio", "constraint", "variant", "seeds")


@dataclass(frozen=True)
class Measure:
    """A column with a number that is no rate.

    Attributes:
        read: The number of one run; None where its record does not have it.
        over: What stands for several seeds.
        style: How it is printed.
    """

    read: Callable[[Row], float | None]
    over: Callable[[list[float]], float]
    style: str

    def of(self, runs: list[Row]) -> float | None:
        """Return the number of a row of the table, from its finished runs."""
        found = [value for run in runs if (value := self.read(run)) is not None]
        return self.over(found) if found else None

    def text(self, runs: list[Row]) -> str:
        """Return it as it is printed; empty where no run has it."""
        value = self.of(runs)
        return "" if value is None else format(value, self.style)


MEASURES = {LEAK: Measure(lambda run: run.get(LEAK), max, ".1e")}


@dataclass(frozen=True)
class Layout:
    """The columns of a table and the order of its rows.

    Attributes:
        columns: Names of rates, also as ``NAME/SUITE``, ``MEASURES`` and costs, in their order; empty: those that say
            something.
        sort: A column to sort the rows of a setting by; with ``-`` in front from the highest value down. None: the
            start, then by ratio, constraint and variant.
    """

    columns: tuple[str, ...] = ()
    sort: str | None = None

    @property
    def key(self) -> str:
        """The column that rows are sorted by."""
        return (self.sort or "").removeprefix("-")

    @property
    def down(self) -> bool:
        """Whether the highest value comes first."""
        return (self.sort or "").startswith("-")

    def of(self, rows: list[Row]) -> tuple[str, ...]:
        """Return the columns; none where none are chosen.

        Raises:
            ConfigError: If one, or the one that is sorted by, is of a suite that no record has, or a mean over suites
                that differ.
        """
        there = sorted({name for row in rows for name in row if OF in name})
        for key, name in [*(("columns", name) for name in self.columns), ("sort", self.key)]:
            if OF in name and name not in there:
                raise ConfigError(key, name, f"of these records: {' | '.join(there) or 'no rate of a suite'}")
            if OF in name and len(made := means_of(rows, name)) > 1:
                told = " and over ".join(sorted(", ".join(each.partition(OF)[2] for each in parts) for parts in made))
                raise ConfigError(key, name, f"a rate of one suite: these records have means over {told}")
        return self.columns


PLAIN = Layout()


def read(config: DictConfig) -> Layout:
    """Return the layout that ``columns`` and ``sort`` ask for.

    Raises:
        ConfigError: If there is no such column.
    """
    given = config.columns
    columns = [] if given is None else list(given) if isinstance(given, ListConfig) else [given]
    if given is not None and (not columns or len(set(columns)) < len(columns)):
        raise ConfigError("columns", given, f"different ones of {_choices()}")
    names = tuple(_column("columns", name) for name in columns)
    sort = None if config.sort is None else str(config.sort)
    if sort is not None and sort.removeprefix("-") not in _ALWAYS:
        try:
            _column("sort", sort.removeprefix("-"))
        except ConfigError as error:
            accepted = f"{' | '.join(_ALWAYS)} | {error.accepted}; with - in front from the highest value down"
            raise ConfigError("sort", sort, accepted) from None
    return Layout(names, sort)


def _choices() -> str:
    return " | ".join([*METRICS, *MEANS, *MEASURES, *COSTS]) + f"; a rate of a suite is NAME{OF}SUITE"


def _column(key: str, name: object) -> str:
    if name in (*MEANS, *MEASURES) or is_cost(str(name)):
        return str(name)
    try:
        return checked(key, name, made=True)
    except ConfigError:
        raise ConfigError(key, name, _choices()) from None
