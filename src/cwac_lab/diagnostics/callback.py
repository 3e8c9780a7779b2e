"""Sample drift while a model is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning as L

from cwac_lab.diagnostics.probe import Probe


class DriftSampler(L.Callback):
    """Measures every so many optimizer steps; a sample is the step and the means over layers, by kind of prompts.

    The last step is left to who measures the trained model, by ``end``.
    """

    def __init__(
        self, probe: Probe, every_n_steps: int, earlier: Sequence[dict[str, Any]],
        record: Callable[[list[dict[str, Any]]], None],
    ) -> None:  # fmt: skip
        """Take a probe of the start, the samples of a run that is resumed, and what writes all samples down."""
        self._probe, self._every, self._record = probe, every_n_steps, record
        self._samples = list(earlier)
        self._seen = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Drop samples of steps that a resumed run takes again."""
        self._seen = pl_module.step
        self._samples = [sample for sample in self._samples if sample["step"] <= self._seen]

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        """Measure, where the step that just ended is one to measure at; figures are logged as ``drift/KIND/NAME``."""
        step = pl_module.step
        if step == self._seen:
            return
        self._seen = step
        if step % self._every or step == pl_module.total_steps:
            pl_module.log_figures("drift", {})
            return
        summary = self._probe.measure(pl_module.model)["summary"]
        self._samples.append({"step": step, **summary})
        self._record(self._samples)
        figures = {f"drift/{kind}/{k}": v for kind, means in summary.items() for k, v in means.items()}
        pl_module.log_figures("drift", figures)

    def end(self, step: int, summary: dict[str, dict[str, float]]) -> None:
        """Take the trained model's means over layers as the sample of the last step."""
        self._samples = [sample for sample in self._samples if sample["step"] < step]
        self._samples.append({"step": step, **summary})
        self._record(self._samples)
