from itertools import product

import numpy as np
import pytest
from scipy.stats import binomtest, bootstrap

from cwac_lab import stats


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
