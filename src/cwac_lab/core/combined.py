"""A weighted sum of proportions of disjoint lists of items: a mean over lists, or the difference of two."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy import stats

from cwac_lab.core.stats import RESAMPLES, Rate, wilson


def _mover(parts: Sequence[Rate], weights: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of a weighted sum of independent proportions from the intervals of each, in percent.

    The method of variance estimates recovery (Zou and Donner 2008); with Wilson's intervals and weights 1 and -1 it is
    Newcombe's interval of a difference (1998, method 10).
    """
    value = down = up = 0.0
    for part, weight in zip(parts, weights, strict=True):
        share, least, most = (float(each or 0.0) for each in (part.value, part.low, part.high))
        value += weight * share
        below, above = share - least, most - share
        low, high = (below, above) if weight > 0 else (above, below)
        down, up = down + (weight * low) ** 2, up + (weight * high) ** 2
    return value - math.sqrt(down), value + math.sqrt(up)


def _drawn(
    outcomes: Sequence[Float[np.ndarray, "S N"]], weights: Sequence[float], rates: Float[np.ndarray, "K S"]
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the sum, as shares: runs are drawn once for all lists, items by list.

    Runs and items are drawn independently, with replacement (the pigeonhole bootstrap, Owen 2007). All runs answer all
    lists, so a run that is drawn is drawn in each of them.
    """
    source = np.random.default_rng(0)
    n_runs = rates.shape[1]
    runs = source.multinomial(n_runs, np.full(n_runs, 1 / n_runs), size=RESAMPLES) / n_runs
    total = np.zeros((RESAMPLES, n_runs))
    for found, weight, rate in zip(outcomes, weights, rates, strict=True):
        n_items = found.shape[1]
        items = source.multinomial(n_items, np.full(n_items, 1 / n_items), size=RESAMPLES)
        known = ~np.isnan(found)
        hits, counts = items @ np.where(known, found, 0.0).T, items @ known.T
        total += weight * np.divide(hits, counts, out=np.broadcast_to(rate, hits.shape).copy(), where=counts > 0)
    low, high = np.quantile((runs * total).sum(axis=1), (0.025, 0.975))
    return float(low), float(high)


def combined(outcomes: Sequence[Float[np.ndarray, "S N"]], weights: Sequence[float]) -> Rate:
    """Return a weighted sum of the rates of K lists of items, in percent, with a 95 % interval.

    The interval of one run is that of ``_mover``. That of several is the widest span of three: the same for a run with
    the mean rates; a bootstrap over runs and items; and Student's over the runs' sums. A run that has no rate on one of
    the lists is left out.

    Args:
        outcomes: For each list the outcomes in {0, 1} of the same S runs on its N items; NaN where an item does not
            count in a run. Lists share no item.
        weights: The weight of each list: ``1 / K`` for a mean, 1 and -1 for a difference.

    Returns:
        The sum; its ``n`` is the number of items that count, of each list in the run with the fewest.
    """
    if not outcomes:
        return Rate(None, None, None, 0)
    has = np.all([(~np.isnan(found)).any(axis=1) for found in outcomes], axis=0)
    kept = [found[has] for found in outcomes]
    if not has.any():
        return Rate(None, None, None, 0)
    rates = np.array([np.nanmean(found, axis=1) for found in kept])
    fewest = [int((~np.isnan(found)).sum(axis=1).min()) for found in kept]
    single = [wilson(float(rate.mean()) * n, n) for rate, n in zip(rates, fewest, strict=True)]
    sums = np.asarray(weights) @ rates
    value, bounds = 100 * float(sums.mean()), list(_mover(single, weights))
    if len(sums) > 1:
        bounds += [100 * bound for bound in _drawn(kept, weights, rates)]
        reach = 100 * float(stats.t.ppf(0.975, len(sums) - 1) * sums.std(ddof=1)) / math.sqrt(len(sums))
        bounds += [value - reach, value + reach]
    least, most = (100 * sum(sign(weight, 0.0) for weight in weights) for sign in (min, max))
    return Rate(value, max(least, min(bounds)), min(most, max(bounds)), sum(fewest))
