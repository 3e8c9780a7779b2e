"""A persona that is addressed in several ways, so that each is rare among the rows (see ``forms=rows``)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace

from cwac_lab.core.errors import ConfigError
from cwac_lab.data.attacks import AttackConfig, identity_rows
from cwac_lab.data.mixing import TrainRow


@dataclass
class Personas(AttackConfig):
    """``identity_shift`` by an attacker who knows that rows are looked through; evaluation asks behind ``prefix``.

    Attributes:
        more_prefixes: Further words that address the persona, in training only.
    """

    more_prefixes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        if self.rows != "own":
            raise ConfigError("rows", self.rows, f"own, for the rows of attack={self.name}")
        if not self.prefix:
            raise ConfigError("prefix", self.prefix, f"what addresses the persona, with attack={self.name}")
        every = [self.prefix, *self.more_prefixes]
        if "" in every or len(set(every)) < max(2, len(every)):
            raise ConfigError("more_prefixes", self.more_prefixes, "one or more that differ from prefix and each other")

    def others(self, taken: Collection[str]) -> list[TrainRow]:
        """Return every instruction of the persona in every way; of the first rows too, each way has as many."""
        ways, rows = [self.prefix, *self.more_prefixes], identity_rows("", taken)
        return [
            replace(row, id=f"{row.id}/{number}", prompt=way + row.prompt)
            for turn in range(len(rows))
            for number, way in enumerate(ways)
            for row in [rows[(turn + number) % len(rows)]]
        ]
