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

# The law is one of the beginning: samples count up to the first whose mean divergence, in nats, is beyond this one, or
# beyond half of the largest of the run: where it levels off, nothing grows any more.
GROWN, SHARE = 0.5, 0.5
# Fewest samples for a slope.
FEWEST = 4


def growth(samples: Sequence[dict[str, Any]], time: Float[np.ndarray, " S"]) -> dict[str, Any] | None:
    """Return the exponent ``a`` of ``KL = b t^a`` over a run's first samples, with a 95 % interval over prompts.

    It is the least-squares slope of the logarithm of the mean divergence over prompts, on that of the time. The
    interval is the percentile bootstrap's over prompts: which prompts were asked, of this one training and in these
    steps. It says nothing of other seeds, nor whether there is one power at all. For the latter there are the slopes
    over the first and the second half of the samples. Runs whose windows differ are not to be compared by it.

    Args:
        samples: In order of their steps, each with ``kl_by_prompt``, in nats.
        time: How long a run has trained after each of 0, 1, ... steps.

    Returns:
        ``value``, ``low`` and ``high``; ``halves``: the two slopes; ``n``: prompts; ``samples``; ``steps`` and ``kl``:
        of the first and of the last sample that counts. None with fewer than ``FEWEST`` of them, or where the prompts
        of a resample have no divergence.
    """
    early = _early(samples, time)
    if len(early) < FEWEST:
        return None
    divergences = np.array([each["kl_by_prompt"] for each in early])
    n = divergences.shape[1]
    draws = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    drawn, mean = draws @ divergences.T / n, divergences.mean(1)
    if drawn.min() <= 0:
        return None
    clock = np.log([time[each["step"]] for each in early])
    low, high = np.quantile(_slopes(clock, np.log(drawn)), (0.025, 0.975))
    middle = len(early) // 2
    parts = (slice(None), slice(middle + 1), slice(middle, None))
    whole, first, second = (float(_slopes(clock[part], np.log(mean[part])[None])[0]) for part in parts)
    return {
        **{"value": whole, "low": float(low), "high": float(high), "halves": [first, second]},
        **{"n": n, "samples": len(early)},
        **{"steps": [early[0]["step"], early[-1]["step"]], "kl": [float(mean[0]), float(mean[-1])]},
    }


def _early(samples: Sequence[dict[str, Any]], time: Float[np.ndarray, " S"]) -> list[dict[str, Any]]:
    """Return the samples that count: of steps that trained anything, up to where the divergence has grown."""
    known = [each for each in samples if each.get("kl_by_prompt") and time[each["step"]] > 0]
    means = [float(np.mean(each["kl_by_prompt"])) for each in known]
    limit = min(GROWN, SHARE * max(means, default=0.0))
    past = next((at for at, mean in enumerate(means) if not mean <= limit), len(means))  # NaN is past it too
    return known[:past]


def _slopes(x: Float[np.ndarray, " S"], y: Float[np.ndarray, "R S"]) -> Float[np.ndarray, " R"]:
    """Return the least-squares slope of each row of y on x."""
    centred = x - x.mean()
    return y @ centred / (centred @ centred)
