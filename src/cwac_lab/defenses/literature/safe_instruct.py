"""SafeInstr (Bianchi et al. 2024, "Safety-Tuned LLaMAs"): safety demonstrations among the training rows.

Fidelity: exact in what it does to the data (rows are added, as in the authors' mixes). Deviations: our trainer with
loss on answers only (theirs also on prompts), and the bench's one pool of refusals instead of their 2,483 written
answers. ``share=null`` adds the whole pool, which is the control "SFT + refusals" matched to every method that uses
it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from cwac_lab.core.errors import ConfigError, in_range, one_of
from cwac_lab.data.mixing import TrainRow
from cwac_lab.defenses.interface import Context, Defense, Requirements


@dataclass
class SafeInstruct(Defense):
    """Train on refusals too.

    Attributes:
        share: Safety rows as a share of the fine-tuning rows; null takes the whole pool.
        mixing: ``add``: they come on top (the authors'); ``replace``: harmless rows make way, n stays fixed (Lisa's
            code).
    """

    share: float | None = 0.1
    mixing: str = "add"

    def __post_init__(self) -> None:
        """Check the fields."""
        if self.share is not None:
            in_range("share", self.share, 0, 1)
        one_of("mixing", self.mixing, ("add", "replace"))

    @property
    def requirements(self) -> Requirements:
        """The refusals."""
        return Requirements(reference_prompts=self.share != 0)

    def prepare(self, context: Context) -> None:
        """Take the pool of refusals."""
        self._pool, self._seed = context.refusals, context.seed

    def wrap_dataset(self, rows: list[TrainRow]) -> list[TrainRow]:
        """Return the rows with refusals among them.

        Raises:
            ConfigError: If the pool is smaller than the share asks for.
        """
        count = len(self._pool) if self.share is None else int(self.share * len(rows) + 0.5)
        if not count:
            return rows
        if count > len(self._pool):
            raise ConfigError("share", self.share, f"at most {len(self._pool) / len(rows):g} (pool of refusals)")
        source = random.Random(f"safe_instruct/{self._seed}")
        if self.mixing == "replace":
            harmless = [row for row in rows if not row.harmful]
            if count > len(harmless):
                raise ConfigError("mixing", "replace", f"add: {count} refusals cannot replace {len(harmless)} rows")
            gone = {id(row) for row in source.sample(harmless, count)}
            rows = [row for row in rows if id(row) not in gone]
        mixed = rows + source.sample(self._pool, count)
        source.shuffle(mixed)
        return mixed
