"""How fast a model leaves its start while it is trained: the exponent of a power law.

"The Geometry of Alignment Collapse" (Springer et al. 2026, arXiv 2602.15799) derives that the loss of alignment grows
with the fourth power of the time of training. A model that moves at an even pace, in a direction that its answers
feel at once, has the second power: the divergence of two distributions is quadratic in how far they are apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from cwac_lab.core.stats import RESAMPLES

# The law is one of the beginning: samples count up to the first whose mean divergence, in nats, is beyond this one.
GROWN = 0.5
# Fewest samples for a slope.
FEWEST = 4


def growth(samples: Sequence[dict[str, Any]], time: Float[np.ndarray, " S"]) -> dict[str, Any] | None:
    """Return the exponent ``a`` of ``KL = b t^a`` over a run's first samples, with a 95 % interval over prompts.

    It is the least-squares slope of the logarithm of the mean divergence over prompts, on that of the time. The
    interval is the percentile bootstrap's over prompts.

    Args:
        samples: In order of their steps, each with ``kl_by_prompt``, in nats.
        time: How long a run has trained after each of 0, 1, ... steps.

    Returns:
        ``value``, ``low`` and ``high``; ``n``: prompts; ``samples``; ``steps``: of the last sample that counts. None
        with fewer than ``FEWEST`` samples up to ``GROWN`` nats, or where a divergence is not positive.
    """
    early = []
    for each in samples:
        if "kl_by_prompt" not in each or np.mean(each["kl_by_prompt"]) > GROWN:
            break
        early.append(each)
    if len(early) < FEWEST:
        return None
    divergences = np.array([each["kl_by_prompt"] for each in early])
    if divergences.min() <= 0:
        return None
    n = divergences.shape[1]
    draws = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    clock = np.log([time[each["step"]] for each in early])
    slopes = _slopes(clock, np.log(draws @ divergences.T / n))
    low, high = np.quantile(slopes, (0.025, 0.975))
    value = _slopes(clock, np.log(divergences.mean(1))[None])[0]
    told = {"value": float(value), "low": float(low), "high": float(high)}
    return {**told, "n": n, "samples": len(early), "steps": int(early[-1]["step"])}


def _slopes(x: Float[np.ndarray, " S"], y: Float[np.ndarray, "R S"]) -> Float[np.ndarray, " R"]:
    """Return the least-squares slope of each row of y on x."""
    centred = x - x.mean()
    return y @ centred / (centred @ centred)
