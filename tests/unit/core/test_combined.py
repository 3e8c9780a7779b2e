"""Weighted sums of proportions: against published intervals, statsmodels, and Student's by hand."""

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.proportion import confint_proportions_2indep

from cwac_lab.core.combined import _drawn, combined
from cwac_lab.core.stats import wilson


def said(hits, n):
    return np.array([[1.0] * hits + [0.0] * (n - hits)])


# Newcombe 1998, table II: intervals by method 10, of the difference of two independent proportions.
PUBLISHED = [(56, 70, 48, 80, 0.0524, 0.3339), (9, 10, 3, 10, 0.1705, 0.8090), (10, 10, 0, 20, 0.6791, 1.0)]


@pytest.mark.parametrize(("a", "m", "b", "n", "low", "high"), PUBLISHED)
def test_a_difference_of_one_run_has_newcombes_interval(a, m, b, n, low, high):
    found = combined([said(a, m), said(b, n)], [1.0, -1.0])
    assert (found.low, found.high) == pytest.approx((100 * low, 100 * high), abs=0.006)
    assert found.value == pytest.approx(100 * (a / m - b / n))
    assert found.n == m + n
    theirs = confint_proportions_2indep(a, m, b, n, compare="diff", method="newcomb")
    assert (found.low, found.high) == pytest.approx((100 * theirs[0], 100 * theirs[1]), abs=1e-6)


def test_a_mean_of_one_list_is_its_own_rate():
    assert combined([said(3, 20)], [1.0]) == pytest.approx(wilson(3, 20), abs=1e-9)


def test_a_mean_weighs_lists_alike_whatever_their_length():
    found = combined([said(1, 2), said(0, 98)], [0.5, 0.5])
    assert found.value == pytest.approx(25.0)
    assert found.low < 25 < found.high


def test_the_interval_of_a_mean_covers():
    source, truth, inside = np.random.default_rng(3), (0.1, 0.4, 0.8), 0
    for _ in range(400):
        lists = [(source.random((1, n)) < share).astype(float) for n, share in zip((40, 60, 30), truth, strict=True)]
        found = combined(lists, [1 / 3] * 3)
        inside += found.low <= 100 * np.mean(truth) <= found.high
    assert inside >= 370  # 95 % is 380; three standard errors below it are 367


def test_lists_with_the_same_items_tell_no_more_than_one():
    alone = combined([said(12, 40)], [1.0])
    names = list(range(40))
    twice = combined([said(12, 40)] * 2, [0.5, 0.5], [names, names])
    assert (twice.value, twice.low, twice.high) == pytest.approx((alone.value, alone.low, alone.high))
    assert twice.n == alone.n
    apart = combined([said(12, 40)] * 2, [0.5, 0.5])
    assert apart.high - apart.low < 0.75 * (twice.high - twice.low)
    assert combined([said(12, 40)] * 2, [0.5, 0.5], [names, [-1 - name for name in names]]) == apart


def test_items_of_two_lists_are_drawn_once():
    """The bootstrap alone: of the same list twice it is as wide as of one, of two lists without a common item less."""
    runs = np.vstack([np.r_[np.ones(150), np.zeros(150)]] * 2)
    names, rates = list(range(300)), np.array([[0.5, 0.5]])
    (low, high), wide = _drawn([runs], [1.0], rates, None), {}
    for together in (True, False):
        ends = _drawn([runs] * 2, [0.5, 0.5], np.vstack([rates] * 2), [names] * 2 if together else None)
        wide[together] = (ends[1] - ends[0]) / (high - low)
    assert wide[True] == pytest.approx(1.0, abs=0.05)
    assert wide[False] == pytest.approx(0.5**0.5, abs=0.05)


def test_the_interval_of_a_mean_covers_where_lists_share_items():
    """Of 60 items the first list has 0 to 39, the second 20 to 59; all vary alike."""
    source, truth, inside = np.random.default_rng(5), 0.4, {True: 0, False: 0}
    names = [list(range(40)), list(range(20, 60))]
    for _ in range(300):
        items = (source.random((1, 60)) < truth).astype(float)
        lists = [items[:, held] for held in names]
        for told in inside:
            found = combined(lists, [0.5, 0.5], names if told else None)
            inside[told] += found.low <= 100 * truth <= found.high
    assert inside[True] >= 273  # 95 % is 285; three standard errors below it are 274
    assert inside[False] < inside[True]


def test_runs_that_differ_widen_the_interval_as_students_does():
    runs = np.repeat([[0.0], [0.5], [1.0]], 40, axis=1)
    runs[1, :20], runs[1, 20:] = 0.0, 1.0
    found = combined([runs, runs[:, ::-1]], [0.5, 0.5])
    by_run = 100 * runs.mean(axis=1)
    reach = stats.t.ppf(0.975, 2) * by_run.std(ddof=1) / np.sqrt(3)
    assert (found.low, found.high) == pytest.approx((max(0, 50 - reach), min(100, 50 + reach)))


def test_the_same_runs_answer_all_lists():
    """Two lists on which runs go up and down together: their difference does not vary over runs, their mean does."""
    lost = np.vstack([np.r_[np.ones(share), np.zeros(200 - share)] for share in (40, 80, 120, 160)])
    apart = combined([lost, lost[:, ::-1]], [1.0, -1.0])
    mean = combined([lost, lost[:, ::-1]], [0.5, 0.5])
    assert apart.value == pytest.approx(0.0)
    assert apart.high - apart.low < 25 < mean.high - mean.low


def test_items_that_do_not_count_and_runs_without_a_rate():
    first = np.array([[1.0, np.nan, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], [np.nan] * 4])
    second = np.array([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    found = combined([first, second], [0.5, 0.5])
    assert found.value == pytest.approx(100 * np.mean([(1 / 3 + 1 / 2) / 2, (1 / 2 + 0) / 2]))
    assert found.n == 3 + 2
    nothing = combined([first[2:], second[2:]], [0.5, 0.5])
    assert (nothing.value, nothing.n) == (None, 0)
    assert combined([], []).value is None
