"""A weighted sum of proportions of lists of items, which may share some: a mean over lists, or a difference of two."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Float
from scipy import stats

from cwac_lab.core.stats import RESAMPLES, Rate, wilson


def _mover(parts: Sequence[Rate], weights: Sequence[float], shared: Float[np.ndarray, "K K"]) -> tuple[float, float]:
    """Return the 95 % interval of a weighted sum of proportions from the intervals of each, in percent.

    The method of variance estimates recovery (Zou and Donner 2008, with correlations Zou 2008); with Wilson's intervals
    and weights 1 and -1 it is Newcombe's interval of a difference (1998, method 10).
    """
    value, down, up = 0.0, [], []
    for part, weight in zip(parts, weights, strict=True):
        share, least, most = (float(each or 0.0) for each in (part.value, part.low, part.high))
        value += weight * share
        below, above = share - least, most - share
        low, high = (below, above) if weight > 0 else (above, below)
        down.append(weight * low)
        up.append(weight * high)
    spread = (math.sqrt(max(0.0, float(np.array(ends) @ shared @ np.array(ends)))) for ends in (down, up))
    return value - next(spread), value + next(spread)


def _shared(lists: Sequence[set[Hashable]]) -> Float[np.ndarray, "K K"]:
    """Return how far the rates of lists go together: ``n_jk / sqrt(n_j n_k)``, with n_jk items that both have.

    It is the correlation of two means of independent items that vary alike.
    """
    return np.array([[len(a & b) / math.sqrt(len(a) * len(b)) for b in lists] for a in lists])


def _drawn(
    outcomes: Sequence[Float[np.ndarray, "S N"]], weights: Sequence[float], rates: Float[np.ndarray, "K S"],
    names: Sequence[Sequence[Hashable]] | None,
) -> tuple[float, float]:  # fmt: skip
    """Return the percentile bootstrap interval of the sum, as shares: runs are drawn once for all lists, items by list.

    Runs and items are drawn independently, with replacement (the pigeonhole bootstrap, Owen 2007). All runs answer all
    lists, so a run that is drawn is drawn in each of them. With ``names`` so are items, of which lists share some.
    """
    source = np.random.default_rng(0)
    n_runs = rates.shape[1]
    runs = source.multinomial(n_runs, np.full(n_runs, 1 / n_runs), size=RESAMPLES) / n_runs
    total = np.zeros((RESAMPLES, n_runs))
    place = {name: at for at, name in enumerate(dict.fromkeys(name for held in names or () for name in held))}
    drawn = source.multinomial(len(place), np.full(len(place), 1 / len(place)), size=RESAMPLES) if place else None
    for at, (found, weight, rate) in enumerate(zip(outcomes, weights, rates, strict=True)):
        n_items = found.shape[1]
        if names is None or drawn is None:
            items = source.multinomial(n_items, np.full(n_items, 1 / n_items), size=RESAMPLES)
        else:
            items = drawn[:, [place[name] for name in names[at]]]
        known = ~np.isnan(found)
        hits, counts = items @ np.where(known, found, 0.0).T, items @ known.T
        total += weight * np.divide(hits, counts, out=np.broadcast_to(rate, hits.shape).copy(), where=counts > 0)
    low, high = np.quantile((runs * total).sum(axis=1), (0.025, 0.975))
    return float(low), float(high)


def combined(
    outcomes: Sequence[Float[np.ndarray, "S N"]], weights: Sequence[float],
    names: Sequence[Sequence[Hashable]] | None = None,
) -> Rate:  # fmt: skip
    """Return a weighted sum of the rates of K lists of items, in percent, with a 95 % interval.

    The interval of one run is that of ``_mover``. That of several is the widest span of three: the same for a run with
    the mean rates; a bootstrap over runs and items; and Student's over the runs' sums. A run that has no rate on one of
    the lists is left out.

    Args:
        outcomes: For each list the outcomes in {0, 1} of the same S runs on its N items; NaN where an item does not
            count in a run.
        weights: The weight of each list: ``1 / K`` for a mean, 1 and -1 for a difference.
        names: For each list the names of its items, by which an item of several lists is one; None: they share none.

    Returns:
        The sum; its ``n`` is the number of items that count, one of several lists once: of each list in the run with
        the fewest, less what lists share.
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
    together, n = np.eye(len(kept)), sum(fewest)
    if names is not None:
        counts = [(~np.isnan(found)).any(axis=0) for found in kept]
        held = [{name for name, there in zip(*each, strict=True) if there} for each in zip(names, counts, strict=True)]
        together = _shared(held)
        n -= sum(map(len, held)) - len(set().union(*held))
    some = names if together.sum() > len(kept) else None
    value, bounds = 100 * float(sums.mean()), list(_mover(single, weights, together))
    if len(sums) > 1:
        bounds += [100 * bound for bound in _drawn(kept, weights, rates, some)]
        reach = 100 * float(stats.t.ppf(0.975, len(sums) - 1) * sums.std(ddof=1)) / math.sqrt(len(sums))
        bounds += [value - reach, value + reach]
    least, most = (100 * sum(sign(weight, 0.0) for weight in weights) for sign in (min, max))
    return Rate(value, max(least, min(bounds)), min(most, max(bounds)), n)
