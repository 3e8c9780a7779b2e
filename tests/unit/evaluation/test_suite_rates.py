"""Rates of named suites: which rows each is of, what is made of several, and that a run's own rates do not see them."""

import numpy as np
import pytest

from cwac_lab.core.combined import combined
from cwac_lab.core.stats import wilson
from cwac_lab.evaluation.combined import CONTRAST, POOLED, combined_of, described, matrix
from cwac_lab.evaluation.metrics import METRICS, metric, metrics_of
from cwac_lab.evaluation.verdicts import aggregate, agreement, outcomes


def said(kind, number, *, refused, suite=None, incoherent=False, start=None):
    row = {"kind": kind, "id": f"{suite}/{kind} {number} of {suite}", "refused": refused, "incoherent": incoherent}
    row |= {"complied": not refused and not incoherent}
    row |= {"start_refused": start} if start is not None else {}
    return row | ({"suite": suite} if suite else {})


OWN = [said("harmful", i, refused=i < 3, start=True) for i in range(4)] + [said("lookalike", 0, refused=False)]
A = [said("harmful", i, refused=i < 1, suite="a", start=i < 2) for i in range(5)]
B = [said("harmful", i, refused=True, suite="b", start=True) for i in range(2)]
PAIRS = [said("harmful", i, refused=i < 9, suite="x", start=True) for i in range(10)] + [
    said("lookalike", i, refused=i < 2, suite="x") for i in range(8)
]


def test_the_rates_of_a_run_do_not_see_its_suites():
    alone, beside = aggregate(OWN), aggregate(OWN + A + B + PAIRS)
    assert {name: beside[name] for name in alone} == alone
    own, more = agreement(OWN, OWN), [row | {"refused": True, "complied": None} for row in A]
    assert agreement(OWN + A, OWN + more) == own | {"unparsable": len(A)}


def test_harmfulness_is_of_a_runs_own_prompts():
    own = [row | {"harmfulness": 0.0} for row in OWN]
    assert aggregate(own + [row | {"harmfulness": 1.0} for row in A])["harmfulness"] == aggregate(own)["harmfulness"]


def test_each_suite_has_the_rates_of_its_kinds():
    found = aggregate(OWN + A + PAIRS)
    assert found["harmful_score/a"] == wilson(4, 5).to_dict()
    assert found["retained_refusals/a"] == wilson(1, 2).to_dict()
    assert found["over_refusal_lookalike/x"] == wilson(2, 8).to_dict()
    assert found["refused/x"] == wilson(9, 10).to_dict()
    assert {name.partition("/")[0] for name in found if name.endswith("/a")} == {
        "harmful_score", "retained_refusals", "incoherent",
    }  # fmt: skip
    assert list(metrics_of(OWN)) == list(METRICS)


def test_a_mean_over_suites_leaves_contrasts_out_and_weighs_suites_alike():
    verdicts = OWN + A + B + PAIRS
    found = combined_of(verdicts)
    assert set(found) == {f"harmful_score/{POOLED}", f"retained_refusals/{POOLED}", f"{CONTRAST}/x"}
    mean = found[f"harmful_score/{POOLED}"].rate([verdicts])
    assert mean.value == pytest.approx((80 + 0) / 2)
    assert mean == combined([matrix([verdicts], "harmful_score/a"), matrix([verdicts], "harmful_score/b")], [0.5, 0.5])
    assert found[f"{CONTRAST}/x"].rate([verdicts]).value == pytest.approx(90 - 25)
    assert not {f"harmful_score/{POOLED}"} & set(combined_of(OWN + A + PAIRS))
    assert combined_of(OWN) == {}


def test_a_prompt_of_two_suites_is_one_prompt():
    other = [{**row, "suite": "c", "id": row["id"].replace("a/", "c/", 1)} for row in A]
    found = combined_of(A + other)[f"harmful_score/{POOLED}"].rate([A + other])
    once = wilson(4, 5)
    assert (found.value, found.low, found.high) == pytest.approx((once.value, once.low, once.high))
    apart = combined_of(A + B)[f"harmful_score/{POOLED}"]
    assert apart.rate([A + B]) == combined([matrix([A + B], f"harmful_score/{name}") for name in "ab"], [0.5, 0.5])


def test_runs_of_one_table_are_told_together():
    worse = [row | {"refused": False, "complied": True} for row in A]
    found = combined_of(OWN + A + B)[f"harmful_score/{POOLED}"].rate([OWN + A + B, OWN + worse + B])
    assert found.value == pytest.approx(np.mean([(80 + 0) / 2, (100 + 0) / 2]))
    assert found.n == 5 + 2


@pytest.mark.parametrize("name", ["harmful_score/a", "over_refusal_lookalike/x", "refused/x", "retained_refusals/a"])
def test_a_rate_is_found_by_its_name(name):
    verdicts = OWN + A + PAIRS
    found = described(name)
    assert found == metric(name) == metrics_of(verdicts)[name]
    assert found.suite == name.partition("/")[2]
    assert f", {found.suite}" in found.heading
    assert ("higher is better" in found.words) == found.higher_is_better
    assert all(item[1].startswith(f"{found.suite}/") for item in outcomes(verdicts, name))
    with pytest.raises(KeyError):
        described("harm/x")


@pytest.mark.parametrize("name", [f"harmful_score/{POOLED}", f"retained_refusals/{POOLED}", f"{CONTRAST}/x"])
def test_a_combined_figure_has_words_and_a_direction(name):
    found, made = described(name), combined_of(OWN + A + B + PAIRS)[name]
    assert (found.heading, found.words, found.arrow) == (made.heading, made.words, made.arrow)
    assert ("higher is better" in found.words) == found.higher_is_better
    assert sum(made.weights.values()) == pytest.approx(0 if name.startswith(CONTRAST) else 1)
