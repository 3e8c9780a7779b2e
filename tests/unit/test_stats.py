from itertools import product

import numpy as np
import pytest
from scipy.stats import binomtest, bootstrap

from cwac_lab import stats
from cwac_lab.stats import RESAMPLES, mean_rate, wilson


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (3, 10), (10, 10), (8, 100), (150, 300)])
def test_wilson_equals_scipys(hits, n):
    expected = binomtest(hits, n).proportion_ci(0.95, method="wilson")
    rate = stats.wilson(hits, n)
    assert rate.value == pytest.approx(100 * hits / n)
    assert (rate.low, rate.high) == (pytest.approx(100 * expected.low), pytest.approx(100 * expected.high))


def test_no_observation_is_no_rate():
    assert stats.wilson(0, 0) == stats.Rate(None, None, None, 0)
    assert "n/a" in str(stats.wilson(0, 0))


def test_hits_out_of_range():
    with pytest.raises(ValueError, match="hits"):
        stats.wilson(3, 2)


def outcomes(share, shape, seed):
    return (np.random.default_rng(seed).random(shape) < share).astype(float)


def test_a_paired_difference_of_one_seed_is_the_plain_bootstrap():
    ours, other = outcomes(0.7, (1, 300), 0), outcomes(0.8, (1, 300), 1)
    found = stats.paired_difference(ours, other)
    expected = bootstrap(
        ((ours - other)[0],), np.mean, method="percentile", n_resamples=4000, rng=np.random.default_rng(5)
    ).confidence_interval
    assert found.value == pytest.approx(100 * (ours.mean() - other.mean()))
    assert (found.low, found.high) == (
        pytest.approx(100 * expected.low, abs=0.6),
        pytest.approx(100 * expected.high, abs=0.6),
    )
    assert str(found).endswith("(n=300, 1 seed)")


def test_a_paired_difference_draws_seeds_and_items():
    delta = outcomes(0.5, (3, 80), 2) - outcomes(0.5, (3, 80), 3)
    delta[0] -= 0.3
    source, means = np.random.default_rng(9), []
    for _ in range(4000):
        drawn = delta[np.ix_(source.integers(3, size=3), source.integers(80, size=80))]
        means.append(100 * drawn.mean())
    found = stats.paired_difference(delta, np.zeros_like(delta))
    low, high = np.quantile(means, (0.025, 0.975))
    assert (found.low, found.high) == (pytest.approx(low, abs=1.5), pytest.approx(high, abs=1.5))
    # Seeds that differ widen the interval beyond that of the items alone.
    alone = stats.paired_difference(delta.mean(0, keepdims=True), np.zeros((1, 80)))
    assert found.high - found.low > 1.2 * (alone.high - alone.low)


def test_a_paired_difference_needs_pairs():
    with pytest.raises(ValueError, match="shapes"):
        stats.paired_difference(np.zeros((1, 3)), np.zeros((1, 4)))


def test_sign_flips_are_enumerated_where_there_are_few():
    ours, other = outcomes(0.8, (2, 8), 4), outcomes(0.3, (2, 8), 5)
    delta = (ours - other).mean(0)
    flipped = [abs(np.mean(delta * signs)) for signs in product((1, -1), repeat=8)]
    expected = np.mean([value >= abs(delta.mean()) - 1e-12 for value in flipped])
    assert stats.sign_flip_p(ours, other) == pytest.approx(expected)
    assert stats.sign_flip_p(ours, ours) == 1.0


def test_sign_flips_hold_their_level():
    rejected = [stats.sign_flip_p(outcomes(0.5, (1, 60), i), outcomes(0.5, (1, 60), 999 + i)) < 0.05 for i in range(60)]
    assert np.mean(rejected) < 0.15


def test_holm():
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0]
    assert stats.holm([]) == []


def test_the_interval_over_seeds_and_items_against_a_loop():
    """The same resamples one by one; incoherent items (NaN) count in no rate."""
    source = np.random.default_rng(3)
    outcomes = (source.random((4, 300)) < 0.3 * np.array([[0.2], [1.0], [2.0], [1.0]])).astype(float)
    outcomes[source.random(outcomes.shape) < 0.1] = np.nan
    strata = [3, 1]
    found = mean_rate(outcomes, strata)
    per_run = [np.nanmean(row) for row in outcomes]
    assert found.value == pytest.approx(100 * (np.mean(per_run[:3]) + per_run[3]) / 2)
    assert found.n == (~np.isnan(outcomes)).sum(axis=1).min()
    draws = np.random.default_rng(0)
    first, second = (draws.multinomial(n, np.full(n, 1 / n), size=RESAMPLES) for n in strata)
    items = draws.multinomial(300, np.full(300, 1 / 300), size=RESAMPLES)
    means = []
    for a, b, drawn in zip(first, second, items, strict=True):
        rates = [np.nanmean(np.repeat(row, drawn)) for row in outcomes]
        means.append((np.dot(a, rates[:3]) / a.sum() + np.dot(b, rates[3:]) / b.sum()) / 2)
    single = wilson(found.value / 100 * found.n, found.n)
    expected = 100 * np.quantile(means, 0.025), 100 * np.quantile(means, 0.975)
    assert expected[0] < single.low  # the seeds differ more than items do: here the bootstrap is the wider one
    assert expected[1] > single.high
    assert (found.low, found.high) == (pytest.approx(expected[0]), pytest.approx(expected[1]))


def test_the_mean_rate_of_one_run_and_of_runs_that_are_alike_has_wilsons_interval():
    one = np.array([[1.0, 0.0, np.nan, 0.0]])
    assert mean_rate(one) == wilson(1, 3)
    assert mean_rate(np.ones((3, 50))) == wilson(50, 50)
    assert mean_rate(np.full((2, 4), np.nan)).value is None
    assert mean_rate(np.empty((1, 0))).n == mean_rate(np.empty((0, 0))).n == 0


def test_a_run_that_has_no_rate_is_left_out():
    runs = np.array([[1.0, 0.0, 0.0, 0.0], [np.nan] * 4, [1.0, 1.0, 0.0, np.nan]])
    assert mean_rate(runs) == mean_rate(runs[[0, 2]])
    assert mean_rate(runs).value == pytest.approx(100 * (1 / 4 + 2 / 3) / 2)
    assert mean_rate(runs).n == 3
    assert mean_rate(runs, [2, 1]).value == mean_rate(runs).value
    assert mean_rate(runs, [1, 1, 1]).n == 0  # a task without a rate has no part in a mean over tasks


def test_strata_that_share_no_item_add_theirs():
    runs = np.array([[1.0, 0.0, np.nan, np.nan, np.nan], [np.nan, np.nan, 1.0, 0.0, 0.0]])
    assert mean_rate(runs, [1, 1]).n == 5
    assert mean_rate(runs, [1, 1]).value == pytest.approx(100 * (1 / 2 + 1 / 3) / 2)


def test_more_seeds_of_the_same_outcomes_do_not_narrow_the_interval():
    outcomes = (np.arange(100) < 20).astype(float)
    three, six = (mean_rate(np.tile(outcomes, (seeds, 1))) for seeds in (3, 6))
    assert three.high - three.low == pytest.approx(six.high - six.low, abs=1)
    assert three.n == six.n == 100


@pytest.mark.parametrize("n_seeds", [2, 3, 8])
def test_coverage_of_the_interval_over_seeds_and_items(n_seeds):
    """On data with seed and item effects the interval covers the true mean about as often as it says."""
    source, hits, widths = np.random.default_rng(1), 0, []
    for _ in range(200):
        seeds, items = source.normal(0, 0.3, (n_seeds, 1)), source.normal(0, 1, (1, 80))
        noise = source.normal(0, 1, (n_seeds, 80))
        found = mean_rate((seeds + items + noise > 0).astype(float))
        hits += found.low <= 50 <= found.high
        widths.append(found.high - found.low)
    assert hits >= (0.87 if n_seeds == 2 else 0.9) * 200
    assert np.mean(widths) < 32  # Wilson's of one run of 80 is 21 wide, and seeds add to it
