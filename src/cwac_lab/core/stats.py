"""Interval estimates and tests for proportions and for paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float
from scipy import optimize, stats

RESAMPLES = 4000


@dataclass(frozen=True)
class Rate:
    """A proportion in percent with its 95 % Wilson interval; all three are None where ``n`` is 0."""

    value: float | None
    low: float | None
    high: float | None
    n: int

    def to_dict(self) -> dict[str, float | int | None]:
        """Return the fields as a JSON-able dict."""
        return asdict(self)

    def __str__(self) -> str:
        """Render as ``12.0 [7.0, 19.8]``; ``n`` stands in a column of its own."""
        return "n/a" if self.value is None else f"{self.value:.1f} [{self.low:.1f}, {self.high:.1f}]"


def wilson(hits: float, n: int, confidence: float = 0.95) -> Rate:
    """Return the proportion ``hits / n`` in percent with its Wilson score interval (Wilson 1927).

    Args:
        hits: Successes among n; a fraction where it is a mean over runs on the same n items.
        n: Items.
        confidence: Coverage of the interval.

    Raises:
        ValueError: If ``hits`` is not within ``0..n``.
    """
    if not 0 <= hits <= n:
        raise ValueError(f"hits={hits} must lie in 0..n={n}")
    if n == 0:
        return Rate(None, None, None, 0)
    share, z = hits / n, float(stats.norm.ppf((1 + confidence) / 2))
    centre = share + z**2 / (2 * n)
    half = z * (share * (1 - share) / n + (z / (2 * n)) ** 2) ** 0.5
    low, high = ((centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n))
    return Rate(100 * share, 100 * max(0.0, low), 100 * min(1.0, high), n)


def mean_per(totals: Sequence[float], counts: Sequence[int], confidence: float = 0.95) -> Rate:
    """Return ``sum(totals) / sum(counts)`` over n items, with the interval of a ratio of means, in the totals' unit.

    Its variance is that of the residuals ``total - ratio count`` (Cochran 1977, 6.13), its quantile Student's with
    n - 1 degrees of freedom; one item has no interval.

    Args:
        totals: What each item sums to.
        counts: Parts of each item, e.g. tokens of a text.
        confidence: Coverage of the interval.
    """
    n = len(totals)
    if n == 0:
        return Rate(None, None, None, 0)
    x, w = np.asarray(totals, float), np.asarray(counts, float)
    ratio = float(x.sum() / w.sum())
    if n == 1:
        return Rate(ratio, None, None, 1)
    error = math.sqrt(n / (n - 1) * float(((x - ratio * w) ** 2).sum())) / float(w.sum())
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * error
    return Rate(ratio, ratio - half, ratio + half, n)


def mean_within(values: Sequence[float], confidence: float = 0.95) -> Rate:
    """Return the mean of values in [0, 1] in percent, with an interval.

    It is Student's of the values with two zeros and two ones beside them, cut at 0 and 100: what Agresti and Coull
    (1998) add to a share. So it has a width where all values are alike, and holds near the ends too.

    Args:
        values: The values.
        confidence: Coverage of the interval.

    Raises:
        ValueError: If one is not within [0, 1].
    """
    n = len(values)
    if n == 0:
        return Rate(None, None, None, 0)
    if not all(0 <= value <= 1 for value in values):
        raise ValueError("values must lie in [0, 1]")
    wider = mean_per([*values, 0.0, 0.0, 1.0, 1.0], [1] * (n + 4), confidence)
    assert wider.low is not None
    assert wider.high is not None
    return Rate(100 * float(np.mean(values)), 100 * max(0.0, wider.low), 100 * min(1.0, wider.high), n)


@lru_cache(maxsize=8)  # many rows of a table have the same seeds and items; 20 MB for 600 items
def _shares(strata: tuple[int, ...], n_items: int) -> tuple[Float[np.ndarray, "K S"], Float[np.ndarray, "K N"]]:
    """Return how often each of K resamples draws each run and each item, as shares that sum to 1.

    Runs (within their stratum; strata weigh alike) and items are drawn with replacement and independently: the
    pigeonhole bootstrap (Owen 2007) of a crossed design, since all seeds are judged on the same items.
    """
    source = np.random.default_rng(0)
    parts = [source.multinomial(n, np.full(n, 1 / n), size=RESAMPLES) / (n * len(strata)) for n in strata]
    items = source.multinomial(n_items, np.full(n_items, 1 / n_items), size=RESAMPLES) / n_items
    runs = np.concatenate(parts, axis=1)
    for shared in (runs, items):
        shared.setflags(write=False)
    return runs, items


def _student(rates: Sequence[Float[np.ndarray, " S"]]) -> tuple[float, float]:
    """Return Student's 95 % interval of the mean over strata of their runs' mean rates, as shares.

    The variance of the mean is the sum of the strata's ``s^2 / S``, its degrees of freedom are Satterthwaite's (1946).
    A stratum of one run is taken to vary as the others do on average (so not at all
    where these have equal rates). Without a stratum of two runs nothing is known of
    how runs vary, and the interval has no width.

    Args:
        rates: The rates of the S runs of each stratum.
    """
    mean = float(np.mean([each.mean() for each in rates]))
    several = [each for each in rates if len(each) > 1]
    if not several:
        return mean, mean
    typical = float(np.mean([each.var(ddof=1) for each in several]))
    parts = np.array([(each.var(ddof=1) if len(each) > 1 else typical) / len(each) for each in rates])
    known = np.array([each.var(ddof=1) / len(each) for each in several])
    freedom = np.array([len(each) - 1 for each in several])
    if not known.sum():
        return mean, mean
    reach = stats.t.ppf(0.975, known.sum() ** 2 / (known**2 / freedom).sum()) * math.sqrt(parts.sum()) / len(rates)
    return mean - float(reach), mean + float(reach)


def mean_rate(outcomes: Float[np.ndarray, "S N"], strata: Sequence[int] | None = None) -> Rate:
    """Return the mean over S runs of their rates in percent, with a 95 % interval.

    The interval of one run is Wilson's. That of several is the widest span of three: a percentile bootstrap over runs
    and items; Wilson's of a single run with the mean rate, since a bootstrap has no width where all outcomes are alike;
    and Student's over the runs' rates, since a bootstrap is too narrow with a handful of seeds. A run in which no item
    counts has no rate and is left out.

    Args:
        outcomes: Outcomes in {0, 1}, a row a run, a column an item; NaN where an item does not count in a run.
        strata: How many consecutive rows each stratum (a task) has; their means weigh alike. One stratum by default.

    Returns:
        The rate; its ``n`` is the number of items that count in the run with the fewest, summed over strata that have
        no item in common.
    """
    known = ~np.isnan(outcomes)
    has = known.any(axis=1)
    parts = np.split(has, np.cumsum(strata or [len(outcomes)])[:-1])
    sizes = [int(part.sum()) for part in parts]
    if not outcomes.size or not all(sizes):
        return Rate(None, None, None, 0)
    known, values = known[has], np.where(known, outcomes, 0.0)[has]
    per_run = known.sum(axis=1)
    rates = values.sum(axis=1) / per_run
    mean = float(np.repeat(1 / (len(sizes) * np.array(sizes)), sizes) @ rates)
    bounds = np.cumsum(sizes)[:-1]
    used_by = np.sum([part.any(axis=0) for part in np.split(known, bounds)], axis=0)
    fewest = [int(part.min()) for part in np.split(per_run, bounds)]
    n = min(fewest) if used_by.max() > 1 else sum(fewest)
    single = wilson(min(mean, 1.0) * n, n)
    if len(rates) == 1:
        return single
    runs, items = _shares(tuple(sizes), outcomes.shape[1])
    hits, counts = items @ values.T, items @ known.T
    drawn = np.divide(hits, counts, out=np.broadcast_to(rates, hits.shape).copy(), where=counts > 0)
    spans = [np.quantile((runs * drawn).sum(axis=1), (0.025, 0.975)), _student(np.split(rates, bounds))]
    low = min(single.low or 0.0, *(100 * float(low) for low, _ in spans))
    high = max(100.0 if single.high is None else single.high, *(100 * float(high) for _, high in spans))
    return Rate(100 * mean, max(0.0, low), min(100.0, high), n)


def mean_of(runs: Sequence[Rate]) -> Rate:
    """Return the mean of S runs' means over the same items, with a 95 % interval, in their unit.

    The interval of several runs is the widest span of two: the mean of their own intervals, as if all their errors over
    items were one; and Student's over the runs' means, which knows of the seeds.

    Args:
        runs: The mean of each run with its interval over items; one without a value is left out.
    """
    known = [run for run in runs if run.value is not None]
    if not known:
        return Rate(None, None, None, 0)
    values = np.array([run.value for run in known], float)
    mean, n = float(values.mean()), min(run.n for run in known)
    spans = []
    if all(run.low is not None for run in known):
        spans.append(tuple(float(np.mean([getattr(run, end) for run in known])) for end in ("low", "high")))
    if len(known) > 1:
        spans.append(_student([values]))
    if not spans:
        return Rate(mean, None, None, n)
    return Rate(mean, min(low for low, _ in spans), max(high for _, high in spans), n)


@dataclass(frozen=True)
class Difference:
    """A mean paired difference in percentage points with its 95 % interval, over seeds and items."""

    value: float
    low: float
    high: float
    seeds: int
    n: int

    def __str__(self) -> str:
        """Render as ``-5.0 [-8.1, -2.0]``; ``n`` and ``seeds`` stand in columns of their own."""
        return f"{self.value:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


def tango(gains: float, losses: float, n: int) -> tuple[float, float]:
    """Return the 95 % score interval of the difference of two paired proportions (Tango 1998), as shares.

    It has a width, and a bound past zero, also where no pair or pairs of one direction only differ.

    Args:
        gains: Pairs in which only the first is 1 (a mean over seeds need not be whole).
        losses: Pairs in which only the second is.
        n: All pairs.
    """

    def score(delta: float) -> float:
        # losses / n by maximum likelihood where the difference is delta
        linear = (2 * n - gains + losses) * delta - gains - losses
        root = math.sqrt(max(linear**2 + 8 * n * losses * delta * (1 - delta), 0.0))
        variance = n * (2 * (root - linear) / (4 * n) + delta * (1 - delta))
        away = gains - losses - n * delta
        if not away:
            return 0.0
        return away / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, away)

    z = float(stats.norm.ppf(0.975))
    centre = (gains - losses) / n
    low = -1.0 if score(-1.0) <= z else optimize.brentq(lambda delta: score(delta) - z, -1, centre)
    high = 1.0 if score(1.0) >= -z else optimize.brentq(lambda delta: score(delta) + z, centre, 1)
    return float(low), float(high)


def paired_difference(ours: Float[np.ndarray, "S N"], other: Float[np.ndarray, "S N"]) -> Difference:
    """Return the mean of ``ours - other`` in points; both were measured on the same N items under the same S seeds.

    The interval is the widest span of three: a percentile bootstrap that draws seeds and items, each with replacement
    and independently (the pigeonhole bootstrap, Owen 2007); Tango's score interval of the items, since a bootstrap has
    no width where all differences are alike; and Student's over the seeds' differences, since it is too narrow with a
    handful of seeds. With one seed it covers items only.

    Args:
        ours: Outcomes in {0, 1}, a row a seed.
        other: Outcomes of what is compared with, in the same order.

    Raises:
        ValueError: If the shapes differ or there is nothing to compare.
    """
    if ours.shape != other.shape or not ours.size:
        raise ValueError(f"shapes {ours.shape} and {other.shape} must be equal and not empty")
    delta = 100 * (ours - other)
    n_seeds, n_items = delta.shape
    seeds, items = _shares((n_seeds,), n_items)
    bounds = list(np.quantile(((seeds @ delta) * items).sum(axis=1), (0.025, 0.975)))
    gains, losses = (ours > other).sum() / n_seeds, (ours < other).sum() / n_seeds
    bounds += [100 * bound for bound in tango(float(gains), float(losses), n_items)]
    if n_seeds > 1:
        of_seeds = delta.mean(axis=1)
        reach = stats.t.ppf(0.975, n_seeds - 1) * of_seeds.std(ddof=1) / math.sqrt(n_seeds)
        bounds += [of_seeds.mean() - reach, of_seeds.mean() + reach]
    low, high = max(-100.0, float(min(bounds))), min(100.0, float(max(bounds)))
    return Difference(float(delta.mean()), low, high, n_seeds, n_items)


def sign_flip_p(ours: Float[np.ndarray, "S N"], other: Float[np.ndarray, "S N"]) -> float:
    """Return the exact two-sided p-value of "no difference" under flips of the signs of items' differences.

    That is Fisher's randomisation test (1935) over all ``2 ** N`` flips; with one seed it is McNemar's exact test. An
    item's difference is its mean over the S seeds, so the test asks whether these runs differ on other items like the
    N; it takes the seeds as given (a handful of them allows no test of its own).

    Args:
        ours: Outcomes in {0, 1}, a row a seed.
        other: Outcomes of what is compared with, in the same order.

    Raises:
        ValueError: If the outcomes are of other values.
    """
    steps = (ours - other).sum(axis=0)  # S times the items' differences
    if not np.array_equal(steps, np.rint(steps)):
        raise ValueError("outcomes must be 0 or 1")
    reached = np.ones(1)  # the probability of each sum of signed steps, from the lowest to the highest
    for size, count in zip(*np.unique(np.abs(steps).astype(int), return_counts=True), strict=True):
        if size:
            by_this_size = np.zeros(2 * size * count + 1)
            by_this_size[:: 2 * size] = stats.binom.pmf(np.arange(count + 1), count, 0.5)
            reached = np.convolve(reached, by_this_size)
    sums = np.arange(len(reached)) - len(reached) // 2
    return min(1.0, float(reached[np.abs(sums) >= abs(steps.sum())].sum()))


def cohen_kappa(pairs: Sequence[tuple[bool, bool]]) -> dict[str, float | None]:
    """Return Cohen's kappa (1960) of two raters: agreement beyond that of their shares, over what is left of it.

    With n and a 95 % interval by his standard error, ``sqrt(p (1 - p) / n) / (1 - chance)``; of perfect agreement that
    is of no width. The value is None without pairs, and where both say the same of all, as chance does then.
    """
    n = len(pairs)
    if not n:
        return {"kappa": None, "low": None, "high": None, "n": 0}
    agreed = sum(a == b for a, b in pairs) / n
    first, second = sum(a for a, _ in pairs) / n, sum(b for _, b in pairs) / n
    chance = first * second + (1 - first) * (1 - second)
    if chance == 1:
        return {"kappa": None, "low": None, "high": None, "n": n}
    kappa, width = (agreed - chance) / (1 - chance), 1.96 * (agreed * (1 - agreed) / n) ** 0.5 / (1 - chance)
    return {"kappa": kappa, "low": max(-1.0, kappa - width), "high": min(1.0, kappa + width), "n": n}


def holm(p_values: list[float]) -> list[float]:
    """Return p-values adjusted for their number (Holm 1979), in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for place, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[i]))
        adjusted[i] = highest
    return adjusted
