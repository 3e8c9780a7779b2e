from itertools import product

import numpy as np
import pytest
import scipy
from scipy.stats import binomtest, bootstrap, permutation_test

from cwac_lab.core import stats
from cwac_lab.core.stats import RESAMPLES, Rate, mean_of, mean_rate, wilson
from support.cover import table


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


def test_the_mean_of_means_has_the_wider_of_two_intervals():
    alike = [Rate(1.0, 0.9, 1.2, 7), Rate(1.0, 0.8, 1.2, 5)]
    assert mean_of(alike) == Rate(1.0, pytest.approx(0.85), pytest.approx(1.2), 5)
    apart = [Rate(value, value, value, 5) for value in (1.0, 2.0, 4.0)]
    low, high = scipy.stats.t.interval(0.95, 2, loc=7 / 3, scale=scipy.stats.sem([1, 2, 4]))
    assert mean_of(apart) == Rate(pytest.approx(7 / 3), pytest.approx(low), pytest.approx(high), 5)
    assert mean_of([Rate(1.0, None, None, 1)]) == Rate(1.0, None, None, 1)
    assert mean_of([Rate(None, None, None, 0)]) == Rate(None, None, None, 0)


# Values in [0, 1] of several kinds, with their mean.
KINDS = {
    "rare": (lambda source, n: (source.random(n) < 0.04).astype(float), 0.04),
    "grades": (lambda source, n: source.choice([0, 1 / 8, 5 / 8, 1], n, p=[0.85, 0.05, 0.05, 0.05]), 0.0875),
    "alike": (lambda source, n: source.choice([0.5, 1.0], n, p=[0.9, 0.1]), 0.55),
    "spread": (lambda source, n: source.beta(8, 2, n), 0.8),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [30, 100])
def test_the_interval_of_a_mean_within_bounds_covers_it_as_often_as_it_says(kind, n):
    draw, mean = KINDS[kind]
    source = np.random.default_rng(1)
    found = [stats.mean_within(draw(source, n)) for _ in range(600)]
    assert sum(each.low <= 100 * mean <= each.high for each in found) / 600 >= 0.93
    assert all(0 <= each.low <= each.value <= each.high <= 100 for each in found)


@pytest.mark.parametrize("n", [1, 10, 100])
@pytest.mark.parametrize("value", [0.0, 0.25, 1.0])
def test_a_mean_of_like_values_has_a_width_that_shrinks(n, value):
    narrow, wide = stats.mean_within([value] * 10 * n), stats.mean_within([value] * n)
    assert narrow.value == wide.value == pytest.approx(100 * value)
    assert 0 < narrow.high - narrow.low < wide.high - wide.low
    assert stats.mean_within([]) == Rate(None, None, None, 0)
    with pytest.raises(ValueError, match="must lie in"):
        stats.mean_within([value, 1.5])


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
    assert (found.n, found.seeds) == (300, 1)
    assert str(found) == f"{found.value:+.1f} [{found.low:+.1f}, {found.high:+.1f}]"


def pairs(shares, n_items, source):
    """Outcomes of pairs of runs, a row a seed; ``shares``: of items that only the first, only the second has."""
    kind = source.random((len(shares), n_items))
    gains = np.array([gain for gain, _ in shares])[:, None]
    losses = np.array([loss for _, loss in shares])[:, None]
    return (kind < gains).astype(float), ((kind >= gains) & (kind < gains + losses)).astype(float)


def test_a_paired_difference_draws_seeds_and_items():
    ours, other = pairs([(0.1 + 0.02 * seed, 0.1) for seed in range(12)], 80, np.random.default_rng(2))
    delta, source, means = ours - other, np.random.default_rng(9), []
    for _ in range(4000):
        means.append(100 * delta[np.ix_(source.integers(12, size=12), source.integers(80, size=80))].mean())
    of_seeds = 100 * delta.mean(1)
    student = scipy.stats.t.interval(0.95, 11, of_seeds.mean(), scipy.stats.sem(of_seeds))
    score = 100 * np.array(stats.tango((ours > other).sum() / 12, (ours < other).sum() / 12, 80))
    spans = [np.quantile(means, (0.025, 0.975)), student, score]
    found = stats.paired_difference(ours, other)
    assert found.low == pytest.approx(min(low for low, _ in spans), abs=0.5)
    assert found.high == pytest.approx(max(high for _, high in spans), abs=0.5)


@pytest.mark.parametrize(("gains", "losses", "n"), [(7, 1, 21), (0, 0, 75), (1, 0, 97), (0, 3, 50), (30, 22, 300)])
def test_tango_is_the_score_test_inverted(gains, losses, n):
    """At its bounds the score statistic, with the likelihood maximised numerically, is the normal quantile."""
    for delta, sign in zip(stats.tango(gains, losses, n), (1, -1), strict=True):

        def unlikely(share, delta=delta):
            parts = ((gains, share + delta), (losses, share), (n - gains - losses, 1 - 2 * share - delta))
            return -sum(count * np.log(max(part, 1e-300)) for count, part in parts if count)

        lowest, highest = max(0.0, -delta), (1 - delta) / 2
        share = scipy.optimize.minimize_scalar(
            unlikely, bounds=(lowest, highest), method="bounded", options={"xatol": 1e-10}
        ).x
        statistic = (gains - losses - n * delta) / np.sqrt(n * (2 * share + delta - delta**2))
        assert statistic == pytest.approx(sign * 1.95996, abs=2e-3)


def test_equal_answers_are_no_proof_of_no_difference():
    same = np.ones((1, 75))
    found = stats.paired_difference(same, same)
    assert (found.low, found.high) == (pytest.approx(-4.87, abs=0.01), pytest.approx(4.87, abs=0.01))
    assert stats.tango(5, 0, 5)[1] == 1.0
    assert stats.tango(0, 5, 5)[0] == -1.0


@pytest.mark.parametrize(
    ("n_seeds", "n_items", "gain", "loss", "spread"),
    [(1, 97, 0.02, 0.01, 0.0), (1, 75, 0.03, 0.0, 0.0), (2, 150, 0.1, 0.12, 0.06), (3, 150, 0.1, 0.12, 0.06)],
)
def test_coverage_of_paired_differences(n_seeds, n_items, gain, loss, spread):
    """With few differing pairs, and with seeds that differ, the interval covers about as often as it says."""
    source, hits = np.random.default_rng(3), 0
    for _ in range(120):
        shares = [(gain + max(-gain, source.normal(0, spread)), loss) for _ in range(n_seeds)]
        found = stats.paired_difference(*pairs(shares, n_items, source))
        hits += found.low <= 100 * (gain - loss) <= found.high
    assert hits >= 0.9 * 120


def test_a_paired_difference_needs_pairs():
    with pytest.raises(ValueError, match="shapes"):
        stats.paired_difference(np.zeros((1, 3)), np.zeros((1, 4)))


@pytest.mark.parametrize("n_seeds", [1, 2, 3])
def test_all_sign_flips_are_counted(n_seeds):
    """As one enumerates them, and as scipy does where it draws them."""
    ours, other = outcomes(0.8, (n_seeds, 8), 4), outcomes(0.3, (n_seeds, 8), 5)
    delta = (ours - other).mean(0)
    flipped = [abs(np.mean(delta * signs)) for signs in product((1, -1), repeat=8)]
    expected = np.mean([value >= abs(delta.mean()) - 1e-12 for value in flipped])
    assert stats.sign_flip_p(ours, other) == pytest.approx(expected)
    assert stats.sign_flip_p(other, ours) == pytest.approx(expected)
    assert stats.sign_flip_p(ours, ours) == 1.0
    ours, other = outcomes(0.55, (n_seeds, 90), 6), outcomes(0.4, (n_seeds, 90), 7)
    delta = (ours - other).mean(0)
    drawn = permutation_test((delta,), np.mean, permutation_type="samples", n_resamples=40000, rng=1, vectorized=True)
    assert stats.sign_flip_p(ours, other) == pytest.approx(drawn.pvalue, abs=4 * (drawn.pvalue / 40000) ** 0.5)
    assert 0.001 < drawn.pvalue < 0.5


@pytest.mark.parametrize(("gains", "losses"), [(0, 1), (3, 3), (9, 2), (300, 240), (75, 0), (1200, 0)])
def test_sign_flips_of_one_seed_are_mcnemars_test(gains, losses):
    ours = np.array([[1.0] * gains + [0.0] * losses + [1.0] * 5])
    other = np.array([[0.0] * gains + [1.0] * losses + [1.0] * 5])
    assert stats.sign_flip_p(ours, other) == pytest.approx(binomtest(gains, gains + losses).pvalue, rel=1e-9, abs=0)


@pytest.mark.parametrize("value", [0.75, np.nan])
def test_sign_flips_are_of_outcomes(value):
    with pytest.raises(ValueError, match="0 or 1"):
        stats.sign_flip_p(np.full((1, 10), value), np.full((1, 10), 0.25))


def test_sign_flips_hold_their_level():
    source = np.random.default_rng(8)
    for n_seeds in (1, 3):
        p = [stats.sign_flip_p(*source.integers(0, 2, (2, n_seeds, 60)).astype(float)) for _ in range(600)]
        assert np.mean(np.array(p) < 0.05) < 0.05 + 2 * (0.05 * 0.95 / 600) ** 0.5


def test_holm():
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0]
    assert stats.holm([]) == []


@pytest.mark.parametrize("strata", [[8], [7, 5], [2, 2]])
def test_the_interval_over_seeds_and_items_against_a_loop(strata):
    """The same resamples one by one, and scipy's Student and Welch; incoherent items (NaN) count in no rate."""
    source, ends = np.random.default_rng(3), np.cumsum(strata)
    level = source.choice([0.2, 1.0, 2.0], (sum(strata), 1))
    outcomes = (source.random((sum(strata), 300)) < 0.3 * level).astype(float)
    outcomes[source.random(outcomes.shape) < 0.1] = np.nan
    found = mean_rate(outcomes, strata)
    per_run = np.split(np.array([np.nanmean(row) for row in outcomes]), ends[:-1])
    assert found.value == pytest.approx(100 * np.mean([each.mean() for each in per_run]))
    assert found.n == (~np.isnan(outcomes)).sum(axis=1).min()
    draws = np.random.default_rng(0)
    runs = [draws.multinomial(n, np.full(n, 1 / n), size=RESAMPLES) for n in strata]
    items, means = draws.multinomial(300, np.full(300, 1 / 300), size=RESAMPLES), []
    for number, drawn in enumerate(items):
        rates = np.split(np.array([np.nanmean(np.repeat(row, drawn)) for row in outcomes]), ends[:-1])
        means.append(np.mean([np.average(each, weights=of[number]) for each, of in zip(rates, runs, strict=True)]))
    single = wilson(found.value / 100 * found.n, found.n)
    spans = [(single.low, single.high), 100 * np.quantile(means, (0.025, 0.975)), student(per_run)]
    expected = max(0, min(low for low, _ in spans)), min(100, max(high for _, high in spans))
    assert (found.low, found.high) == pytest.approx(expected)


def student(per_run):
    """Student's interval of one stratum; of two, half of Welch's for the first minus the negated second."""
    if len(per_run) == 1:
        (rates,) = per_run
        return scipy.stats.t.interval(0.95, len(rates) - 1, 100 * rates.mean(), 100 * scipy.stats.sem(rates))
    first, second = per_run
    welch = scipy.stats.ttest_ind(first, -second, equal_var=False).confidence_interval()
    return 50 * welch.low, 50 * welch.high


def test_a_stratum_of_one_run_is_taken_to_vary_as_the_others():
    """Known by hand: variances 0.02 of two runs and as much of the one; one degree of freedom."""
    low, high = stats._student([np.array([0.4, 0.6]), np.array([0.5])])
    reach = scipy.stats.t.ppf(0.975, 1) * np.sqrt(0.02 / 2 + 0.02) / 2
    assert (low, high) == pytest.approx((0.5 - reach, 0.5 + reach))
    assert stats._student([np.array([0.4]), np.array([0.6])]) == pytest.approx((0.5, 0.5))


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


@table(strength=2, n_seeds=[2, 3, 5], spread=[0.0, 0.7])
def test_coverage_of_the_interval_over_seeds_and_items(n_seeds, spread):
    """With effects of items, and of seeds or none, the interval covers the true mean as often as it says.

    A probit model: the rate over all seeds and items is known. Of 200 data sets 95 % are 190; a correct interval
    covers fewer than 183 about once in a hundred times.
    """
    source, hits, widths, level = np.random.default_rng(1), 0, [], 0.8
    true = 100 * scipy.stats.norm.cdf(level / np.sqrt(2 + spread**2))
    for _ in range(200):
        seeds, items = source.normal(0, spread, (n_seeds, 1)), source.normal(0, 1, (1, 75))
        noise = source.normal(0, 1, (n_seeds, 75))
        found = mean_rate((level + seeds + items + noise > 0).astype(float))
        hits += found.low <= true <= found.high
        widths.append(found.high - found.low)
    assert hits >= 183
    if n_seeds == 5 and not spread:
        assert np.mean(widths) < 24  # Wilson's of one run of 75 is 22 wide: nothing is given away
