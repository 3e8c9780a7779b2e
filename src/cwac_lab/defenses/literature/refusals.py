"""The refusals to reference prompts, a few at every step, for the methods that hold on to them."""

from __future__ import annotations

from cwac_lab.core.errors import one_of
from cwac_lab.data.batches import collate, cyclic
from cwac_lab.defenses.interface import Context
from cwac_lab.models.answers import Batch, to_device

HELD_ON = ("task", "refusals")


def check_held_on(held_on: str) -> None:
    """Check on what a penalty is taken.

    Raises:
        ConfigError: If it is neither ``task`` nor ``refusals``.
    """
    one_of("held_on", held_on, HELD_ON)


class Refusals:
    """The refusals of a run, in turn."""

    def __init__(self, context: Context, name: str, size: int) -> None:
        """Encode them; ``name`` sets their order, and ``size`` are taken at a step."""
        self.rows = [context.chat.encode(row.prompt, row.response) for row in context.refusals]
        self._model, self._pad_id = context.model, context.chat.pad_id
        self._size, self._seed = size, f"{name}/{context.seed}"

    def batch(self, step: int, *piece: int) -> Batch:
        """Return those of a step, or of one of the pieces that it is divided into: its number, and of how many."""
        rows = cyclic(len(self.rows), self._size, step, self._seed)
        return to_device(collate([self.rows[row] for row in rows], self._pad_id, *piece), self._model.device)

    def beside(self, batch: Batch, step: int) -> Batch:
        """Return those that go with a batch that is trained on: where it is a piece of its step, so are they."""
        return self.batch(step, *(batch["piece"][:2] if "piece" in batch else ()))
