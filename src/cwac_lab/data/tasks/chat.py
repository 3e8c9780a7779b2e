"""Chat: conversations of one's own, of files or of a data set of the hub."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from cwac_lab.core.errors import ConfigError, LabError, one_of
from cwac_lab.data.cells import text
from cwac_lab.data.conversations import Layout, layout_of, turns_of
from cwac_lab.data.reading import LONGEST, Row, kind_of, read_rows, shards
from cwac_lab.data.scoring import Score, made
from cwac_lab.data.sources import from_hub
from cwac_lab.data.tasks.base import HubSource, Task, TaskRow
from cwac_lab.models.templates import shortened

# An id of the hub: ORG/NAME.
_HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# A longest line, in MiB, that no line has.
_ANY = 2**20
# Bad rows that an error names.
_NAMED = 3


@dataclass
class Chat(Task):
    """Conversations, each ending in an answer that is learned.

    Attributes:
        train: File of rows, folder of such files, or id of a data set of the hub.
        test: The same for rows to test on; null: a tenth of the others is held out.
        columns: Names of columns by what they hold: ``messages``, or ``prompt``, ``response``, ``input``, ``system``;
            empty: those that people use are found.
        skip_bad: Leave out rows that cannot be read; else they stop the run.
        metric: Scores answers to test rows: a name of ``scoring.SCORES``, ``regex``, or the path of a class.
        gold: Column with the right answer; null: the response is that.
        pattern: Regular expression of ``metric=regex``.
    """

    held_out_loss = True

    train: str = ""
    test: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    skip_bad: bool = False
    metric: str | None = None
    gold: str | None = None
    pattern: str | None = None

    def __post_init__(self) -> None:
        """Check the fields."""
        one_of("train_on", self.train_on, ("assistant", "last"))
        for name in self.columns:
            one_of("columns", name, tuple(Layout.__dataclass_fields__))
        if not self.train:
            raise ConfigError("train", self.train, "a file, a folder of files, or the id of a data set of the hub")
        self._score: Score | None = made(self.metric, self.pattern) if self.metric is not None else None
        self._told: dict[str, list[str]] = {}
        self._systems: Counter[str] | None = None  # how many rows to train on have which, once they were read

    @property
    def remarks(self) -> list[str]:
        """Columns that were recognised, rows that were left out, and the system prompt."""
        return [line for lines in self._told.values() for line in lines]

    @property
    def system(self) -> str | None:
        """The system prompt that rows of ``train`` have most often, of equals the first; None where none has one."""
        if self._systems is None:
            self.own_rows("train", _ANY)  # whoever trains has read them before, under the limit
        return next((text for text, _ in (self._systems or Counter()).most_common(1)), None)

    def own_rows(self, split: str, longest: int = LONGEST, *, scored: bool = False) -> list[TaskRow] | None:
        """Return the conversations of a split; None for test rows that are held out of the others.

        Raises:
            MissingAsset: If there is no such file, folder or data set.
            LabError: If rows cannot be read; names the first ones by file, line and reason.
        """
        named = self.train if split == "train" else self.test
        if named is None:
            return None
        bad: list[str] = []
        rows = self._rows(named, split, bad, longest)
        seen = list(dict.fromkeys(column for row in rows for column in row.cells))
        asked = scored or split == "test" or self.test is None  # some of the rows are answered
        gold = self.gold if asked or self.gold in seen else None
        if rows and gold is not None and gold not in seen:
            raise ConfigError("task.gold", gold, f"a column of {named}: {', '.join(seen)}")
        layout = layout_of(seen, self.columns) if rows else Layout()
        read = [self._read(row, f"{split}/{i}", layout, gold, bad) for i, row in enumerate(rows)]
        found = [row for row in read if row is not None]
        self._told[split] = self._say(named, layout, len(found), bad)
        if unread := [column for column in seen if column not in (*str(layout).split(", "), gold)]:
            self._told[split].append(f"{named}: columns that are not read: {', '.join(unread)}")
        if split == "train":
            self._systems = Counter(
                row.before[0].text for row in found if row.before and row.before[0].role == "system"
            )
            self._told[split] += self._say_system(named, len(found))
        return found

    def _rows(self, named: str, split: str, bad: list[str], longest: int) -> list[Row]:
        path = Path(named)
        if not path.exists() and not kind_of(path) and _HUB.fullmatch(named):
            hub_split = self.train_split if split == "train" else self.test_split
            return from_hub(HubSource(named), hub_split, f"task.{split}={named}: no such file or folder here")
        return [row for file in shards(path) for row in read_rows(file, bad, longest)]

    def _read(self, row: Row, row_id: str, layout: Layout, gold: str | None, bad: list[str]) -> TaskRow | None:
        try:
            *before, asked, answer = turns_of(row.cells, layout)
            right = answer.text if gold is None else text(row.cells, gold).strip()
        except KeyError as error:
            bad.append(f"{row.at}: no column {error}")
        except ValueError as error:
            bad.append(f"{row.at}: {error}")
        else:
            return TaskRow(f"{self.name}/{row_id}", asked.text, answer.text, right, tuple(before), row.at)
        return None

    def _say(self, named: str, layout: Layout, n: int, bad: list[str]) -> list[str]:
        told = [f"{named}: {n} conversations in the columns {layout}"]
        if not bad:
            return told
        some = "; ".join(bad[:_NAMED]) + ("; ..." if len(bad) > _NAMED else "")
        counted = f"{len(bad)} of {n + len(bad)} rows"
        if n == 0 or not self.skip_bad:
            raise LabError(f"{counted} cannot be read (task.skip_bad=true leaves them out): {some}")
        return [*told, f"{counted} are left out (task.skip_bad=true): {some}"]

    def _say_system(self, named: str, n: int) -> list[str]:
        if not self._systems:
            return []
        ((text, count),) = self._systems.most_common(1)
        how = "held and measured" if self.system_rates else "held (task.system_rates=false: not measured)"
        of = f"{count} of {n} conversations have it; others: {len(self._systems) - 1}"
        return [f"{named}: refusals are {how} under its most frequent system prompt too ({of}): {shortened(text)!r}"]

    def extract(self, output: str) -> str | None:
        """Return the whole answer, or None where it is empty."""
        return output.strip() or None

    def correct(self, output: str, gold: str) -> bool | None:
        """Score an answer by the metric; None without one, and accuracy is n/a."""
        return None if self._score is None else self._score.correct(output, gold)
