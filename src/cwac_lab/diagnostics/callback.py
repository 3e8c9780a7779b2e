"""Measure a model every so many steps while it is trained."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L

from cwac_lab.defenses.interface import settled
from cwac_lab.results.record import flat

Sample = dict[str, Any]


class Sampler(L.Callback):
    """Measures every so many optimizer steps; a sample is the step, what is measured there, and how long that took.

    It is measured as it would be if training ended there: with the weights that its defence makes of the trained ones,
    which are put back. The last step is left to who measures the trained model, by ``end``.
    """

    def __init__(
        self, name: str, measure: Callable[[Any], Sample], every_n_steps: int, earlier: Sequence[Sample],
        record: Callable[[list[Sample]], None],
    ) -> None:  # fmt: skip
        """Take what is measured, the samples of a run that is resumed, and what writes all samples down.

        Args:
            name: Of what is measured; numbers are logged as ``NAME/FIELD``.
            measure: Returns figures of a model, which it leaves as it is.
            every_n_steps: At multiples of it.
            earlier: Samples that there are.
            record: Writes samples down.
        """
        self._name, self._measure, self._every, self._record = name, measure, every_n_steps, record
        self._samples = list(earlier)
        self._seen = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Drop samples of steps that a resumed run takes again."""
        self._seen = pl_module.step
        self._samples = [sample for sample in self._samples if sample["step"] <= self._seen]

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        """Measure, where the step that just ended is one to measure at."""
        step = pl_module.step
        if step == self._seen:
            return
        self._seen = step
        if step % self._every or step == pl_module.total_steps:
            pl_module.log_figures(self._name, {})
            return
        begun = time.perf_counter()
        with settled(pl_module.defense, pl_module.model):
            found = self._measure(pl_module.model)
        self._samples.append({"step": step, **found, "seconds": time.perf_counter() - begun})
        self._record(self._samples)
        figures = flat(found, self._name)
        numbers = {key.replace(".", "/"): value for key, value in figures.items() if isinstance(value, float)}
        pl_module.log_figures(self._name, numbers)

    def end(self, step: int, found: Sample) -> None:
        """Take what is measured of the trained model as the sample of the last step."""
        self._samples = [sample for sample in self._samples if sample["step"] < step]
        self._samples.append({"step": step, **found})
        self._record(self._samples)
