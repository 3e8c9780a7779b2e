"""How refusals go while a model is trained: samples, and when half of them are lost."""

import numpy as np
import pytest

from cwac_lab.evaluation.course import half_lost, sample
from cwac_lab.evaluation.verdicts import aggregate


def said(refused, start=True, *, incoherent=False):
    complied = False if incoherent else None if refused is None else not refused
    return {"kind": "harmful", "id": "", "refused": refused, "incoherent": incoherent, "complied": complied,
            "start_refused": start}  # fmt: skip


def test_a_sample_has_the_rates_that_a_record_of_these_answers_has():
    verdicts = [said(True), said(False), said(False, start=False), said(False, incoherent=True), said(None)]
    verdicts = [{**row, "id": str(n)} for n, row in enumerate(verdicts)]
    found, record = sample(verdicts), aggregate(verdicts)
    for rate in ("harmful_score", "retained_refusals", "incoherent"):
        assert found[rate] == pytest.approx(record[rate]["value"])
    assert found["refused"] == [1, 0, 0, 0, None]
    assert sample([said(True, start=False)])["retained_refusals"] is None


def course(steps, kept, n=8):
    return [
        {"step": step, "refused": [int(at < left) for at in range(n)]} for step, left in zip(steps, kept, strict=True)
    ]


@pytest.mark.parametrize(
    ("kept", "value"),
    [((8, 4, 0), 20), ((8, 6, 2), 25), ((2, 2, 2), 10 * 4 / 6), ((8, 8, 5), None), ((8, 2, 8), 10 + 10 * 4 / 6)],
)
def test_half_are_lost_on_a_straight_line_between_samples(kept, value):
    found = half_lost(course((10, 20, 30), kept), [True] * 8)
    assert found["value"] == (None if value is None else pytest.approx(value))
    assert (found["n"], found["steps"]) == (8, 30)
    if value is not None:
        assert found["low"] <= value
        assert found["high"] is None or found["high"] >= value


def test_only_what_the_start_refuses_can_be_lost():
    samples = [{"step": 10, "refused": [1, 0, 0, None]}]
    found = half_lost(samples, [True, True, False, False])
    assert (found["value"], found["n"]) == (10, 2)
    assert half_lost(samples, [False] * 4) is None
    assert half_lost([], [True]) is None


def test_the_interval_is_that_of_a_bootstrap_over_prompts():
    """Beside an interpolation by numpy, prompt by prompt drawn anew; many prompts are lost at once, step by step."""
    source, steps = np.random.default_rng(1), np.array([0, 10, 20, 30, 40])
    lost_at = source.integers(1, 6, 60)  # at which sample; 5 is never
    samples = [{"step": int(steps[at]), "refused": [int(at < when) for when in lost_at]} for at in range(1, 5)]
    found = half_lost(samples, [True] * 60)
    drawn = []
    for _ in range(2000):
        mine = lost_at[source.integers(0, 60, 60)]
        shares = np.array([(at < mine).mean() for at in range(5)])
        drawn.append(np.interp(-0.5, -shares, steps) if shares.min() <= 0.5 else np.inf)
    low, high = np.quantile(drawn, (0.025, 0.975))
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=1.0)
