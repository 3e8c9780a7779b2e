"""The exponent with which a model leaves its start, beside power laws and a plain regression."""

import numpy as np
import pytest
import scipy.stats

from cwac_lab.evaluation.growth import FEWEST, GROWN, growth
from cwac_lab.training.rates import training_time
from cwac_lab.training.settings import TrainerConfig

STEPS = (2, 4, 6, 8)


def samples(divergence, n=5, steps=STEPS):
    spread = np.linspace(0.5, 1.5, n)
    return [{"step": step, "kl_by_prompt": list(spread * divergence(step))} for step in steps]


def grown(divergence):
    """A run whose last sample, twice as large as any before, is not of the beginning."""
    early = samples(divergence)
    return [*early, {"step": 10, "kl_by_prompt": [2 * max(early[-1]["kl_by_prompt"])] * 5}]


@pytest.mark.parametrize("power", [1.0, 2.0, 4.0])
def test_a_power_law_has_its_exponent(power):
    found = growth(grown(lambda step: 1e-5 * step**power), np.arange(11.0))
    assert [found["value"], found["low"], found["high"]] == pytest.approx([power] * 3)
    assert found["halves"] == pytest.approx([power] * 2)
    assert (found["n"], found["samples"], found["steps"]) == (5, 4, [2, 8])


def test_time_is_the_clock_and_not_the_steps():
    """Over a warm-up the time is quadratic in the steps, so the fourth power of steps is the second of time."""
    assert growth(grown(lambda step: 1e-5 * step**4), np.arange(11.0) ** 2)["value"] == pytest.approx(2)


def test_the_slope_and_its_interval_are_those_of_a_plain_regression():
    source = np.random.default_rng(3)
    drawn = [{"step": step, "kl_by_prompt": list(source.gamma(2, 1e-4 * step**2, 12))} for step in STEPS]
    late = {"step": 10, "kl_by_prompt": [0.4] * 12}
    found, clock = growth([*drawn, late], np.arange(11.0)), np.log(STEPS)
    values = np.array([each["kl_by_prompt"] for each in drawn])
    mean = np.log(values.mean(1))
    assert found["value"] == pytest.approx(scipy.stats.linregress(clock, mean).slope)
    parts = [(clock[:3], mean[:3]), (clock[2:], mean[2:])]
    assert found["halves"] == pytest.approx([scipy.stats.linregress(*part).slope for part in parts])
    slopes = []
    for _ in range(4000):
        taken = source.integers(0, 12, 12)
        slopes.append(scipy.stats.linregress(clock, np.log(values[:, taken].mean(1))).slope)
    assert [found["low"], found["high"]] == pytest.approx(np.quantile(slopes, (0.025, 0.975)), abs=0.1)


@pytest.mark.parametrize("beyond", [2 * GROWN, float("nan")])
def test_only_the_beginning_counts(beyond):
    """What comes after the divergence was first beyond the limit does not, even if it is small again."""
    run = samples(lambda step: 1e-3 * step**2)
    run += [{"step": 10, "kl_by_prompt": [beyond] * 5}, {"step": 11, "kl_by_prompt": [1e-9] * 5}]
    run += [{"step": 12, "kl_by_prompt": [1.0] * 5}]
    found = growth(run, np.arange(13.0))
    assert (found["value"], found["samples"], found["steps"]) == (pytest.approx(2), 4, [2, 8])


def test_a_run_that_levels_off_counts_up_to_half_of_its_largest():
    steps = [*STEPS, 10, 12, 14, 16]
    found = growth(samples(lambda step: 1e-5 * min(step, 12) ** 2, steps=steps), np.arange(17.0))
    assert (found["value"], found["steps"]) == (pytest.approx(2), [2, 8])
    assert found["kl"] == pytest.approx([4e-5, 64e-5])


def test_steps_that_trained_nothing_do_not_count():
    """The first step of a warm-up has a rate of zero."""
    time = np.maximum(np.arange(11.0) - 1, 0)
    run = [{"step": 1, "kl_by_prompt": [1e-9] * 5}, *grown(lambda step: 1e-5 * (step - 1) ** 2)]
    assert growth(run, time)["value"] == pytest.approx(2)


def test_too_few_samples_have_none():
    assert growth(grown(float)[-FEWEST:], np.arange(11.0)) is None
    assert growth(samples(lambda step: 0.0), np.arange(11.0)) is None
    assert growth([{"step": 2, "kl": 0.1}], np.arange(11.0)) is None
    assert growth([], np.arange(11.0)) is None


@pytest.mark.parametrize(
    ("schedule", "warmup"), [("constant", 0.1), ("constant_with_warmup", 0.25), ("linear", 0.1), ("linear", 0)]
)
def test_training_time_adds_the_rates_up(schedule, warmup):
    """Beside the rates written out: up in a straight line, then level or down to zero."""
    steps, rise = 20, int(warmup * 20) if schedule != "constant" else 0
    fall = {"linear": lambda step: (steps - step) / (steps - rise)}.get(schedule, lambda step: 1.0)
    expected = np.cumsum([0, *(step / rise if step < rise else fall(step) for step in range(steps))])
    found = training_time(TrainerConfig(learning_rate=3e-4, schedule=schedule, warmup_share=warmup), steps)
    assert found == pytest.approx(expected)
