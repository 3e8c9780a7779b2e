"""The learning rate over the steps of a run."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from transformers import get_scheduler

from cwac_lab.training.settings import TrainerConfig


def schedule(config: TrainerConfig, optimizer: torch.optim.Optimizer, steps: int) -> Any:
    """Return the schedule of an optimizer over a run of so many steps."""
    return get_scheduler(config.schedule, optimizer, int(config.warmup_share * steps), steps)


def training_time(config: TrainerConfig, steps: int) -> Float[np.ndarray, " S"]:
    """Return the time that a run has trained after each of 0, 1, ... steps: the sum of its rates over the set one.

    One step at the full rate is 1. So runs with and without a warm-up have the same clock.
    """
    only = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    follows, rates = schedule(config, only, steps), []
    for _ in range(steps):
        rates.append(follows.get_last_lr()[0])
        only.step()
        follows.step()
    return np.concatenate([[0.0], np.cumsum(rates)])
