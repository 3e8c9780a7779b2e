"""The exponent with which a model leaves its start, beside power laws and a plain regression."""

import numpy as np
import pytest
import scipy.stats

from cwac_lab.evaluation.growth import FEWEST, GROWN, growth
from cwac_lab.training.rates import training_time
from cwac_lab.training.settings import TrainerConfig

STEPS = (2, 4, 6, 8, 10)


def samples(divergence, n=5, steps=STEPS):
    spread = np.linspace(0.5, 1.5, n)
    return [{"step": step, "kl_by_prompt": list(spread * divergence(step))} for step in steps]


@pytest.mark.parametrize("power", [1.0, 2.0, 4.0])
def test_a_power_law_has_its_exponent(power):
    found = growth(samples(lambda step: 1e-5 * step**power), np.arange(11.0))
    assert [found["value"], found["low"], found["high"]] == pytest.approx([power] * 3)
    assert (found["n"], found["samples"], found["steps"]) == (5, 5, 10)


def test_time_is_the_clock_and_not_the_steps():
    """Over a warm-up the time is quadratic in the steps, so the fourth power of steps is the second of time."""
    assert growth(samples(lambda step: 1e-5 * step**4), np.arange(11.0) ** 2)["value"] == pytest.approx(2)


def test_the_slope_and_its_interval_are_those_of_a_plain_regression():
    source = np.random.default_rng(3)
    drawn = [{"step": step, "kl_by_prompt": list(source.gamma(2, 1e-4 * step**2, 12))} for step in STEPS]
    found, clock = growth(drawn, np.arange(11.0)), np.log(STEPS)
    values = np.array([each["kl_by_prompt"] for each in drawn])
    assert found["value"] == pytest.approx(scipy.stats.linregress(clock, np.log(values.mean(1))).slope)
    slopes = []
    for _ in range(4000):
        taken = source.integers(0, 12, 12)
        slopes.append(scipy.stats.linregress(clock, np.log(values[:, taken].mean(1))).slope)
    assert [found["low"], found["high"]] == pytest.approx(np.quantile(slopes, (0.025, 0.975)), abs=0.1)


def test_only_the_beginning_counts():
    """What comes after the divergence was first beyond the limit does not, even if it is small again."""
    grown = samples(lambda step: 1e-3 * step**2)
    grown += samples(lambda step: 2 * GROWN, steps=[12]) + samples(lambda step: 1e-9, steps=[14])
    found = growth(grown, np.arange(15.0))
    assert (found["value"], found["samples"], found["steps"]) == (pytest.approx(2), 5, 10)


def test_too_few_samples_have_none():
    assert growth(samples(float, steps=STEPS[: FEWEST - 1]), np.arange(11.0)) is None
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
