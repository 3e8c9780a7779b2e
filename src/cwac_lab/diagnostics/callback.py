"""Sample drift while a model is trained."""

from __future__ import annotations

from typing import Any

import lightning as L

from cwac_lab.diagnostics.probe import Probe


class DriftSampler(L.Callback):
    """Measures every so many optimizer steps; ``samples`` holds the step and the means over layers of each."""

    def __init__(self, probe: Probe, every_n_steps: int) -> None:
        """Take a probe of the start."""
        self.samples: list[dict[str, Any]] = []
        self._probe, self._every, self._seen = probe, every_n_steps, 0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        """Measure, where the step that just ended is one to measure at; figures are logged as ``drift/KIND/NAME``."""
        step = pl_module.step
        if step == self._seen or step % self._every:
            return
        self._seen = step
        summary = self._probe.measure(pl_module.model)["summary"]
        self.samples.append({"step": step, **summary})
        figures = {f"drift/{kind}/{name}": value for kind, means in summary.items() for name, value in means.items()}
        pl_module.log_dict(figures)
