import pytest
from scipy.stats import binomtest

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
