"""Figures that are made of the rates of several suites, or of both kinds of one: the mean over suites, a contrast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from cwac_lab.core.combined import combined
from cwac_lab.core.stats import Rate
from cwac_lab.evaluation.metrics import METRICS, POOLED, REFUSED, Judged, Metric, kinds_of_suites, metric
from cwac_lab.evaluation.verdicts import outcomes

_POOLED = ("harmful_score", "retained_refusals")
CONTRAST = "contrast"
SAFE = "over_refusal_lookalike"


@dataclass(frozen=True)
class Combined:
    """A weighted sum of rates, in percentage points.

    Attributes:
        name: Its field in records.
        heading: How tables call it.
        words: How the screen calls it.
        weights: Rates by name with their weights.
        higher_is_better: Its direction.
        shown: Whether the screen has it.
    """

    name: str
    heading: str
    words: str
    weights: dict[str, float] = field(default_factory=dict)
    higher_is_better: bool = False
    shown: bool = True

    @property
    def arrow(self) -> str:
        """Its direction as a sign."""
        return "↑" if self.higher_is_better else "↓"

    def rate(self, runs: Sequence[Sequence[Judged]]) -> Rate:
        """Return it over runs, by their verdicts, with a 95 % interval (see ``core.combined``).

        A prompt that several suites have is one prompt.
        """
        parts = [_answered(runs, name) for name in self.weights]
        names = [[(kind, suite_id.rpartition("/")[2]) for kind, suite_id in items] for items, _ in parts]
        return combined([found for _, found in parts], list(self.weights.values()), names)


def _answered(runs: Sequence[Sequence[Judged]], rate: str) -> tuple[list[tuple[str, str]], Any]:
    found = [outcomes(verdicts, rate) for verdicts in runs]
    items = sorted(set().union(*found))
    return items, np.array([[float(known.get(item, np.nan)) for item in items] for known in found]).reshape(
        len(runs), len(items)
    )


def matrix(runs: Sequence[Sequence[Judged]], rate: str) -> Any:
    """Return the outcomes of S runs, by their verdicts, on the N items that count in any; NaN where one does not."""
    return _answered(runs, rate)[1]


def described(name: str) -> Metric | Combined:
    """Return a rate or combined figure by its name, for its words and direction; without the weights of the latter.

    Raises:
        KeyError: If there is no such rate.
    """
    rate, _, suite = name.partition("/")
    if rate == CONTRAST:
        words = f"refused, harmful less look-alikes, {suite} (higher is better)"
        return Combined(name, f"contrast, {suite}", words, higher_is_better=True)
    if suite != POOLED:
        return metric(name)
    own = METRICS[rate]
    better = "higher" if own.higher_is_better else "lower"
    words = f"{own.words.partition(' (')[0]}, mean over suites ({better} is better)"
    return Combined(name, f"{own.heading}, {POOLED}", words, higher_is_better=own.higher_is_better)


def combined_of(verdicts: Sequence[Judged]) -> dict[str, Combined]:
    """Return the combined figures that verdicts have.

    ``RATE/pooled`` is the mean over the suites of harmful prompts only. ``contrast/SUITE``, of a suite of both kinds,
    is the share of its harmful prompts that is refused, less that of its look-alikes.
    """
    suites = kinds_of_suites(verdicts)
    pooled = sorted(name for name, kinds in suites.items() if kinds == {"harmful"})
    weights = {}
    for rate in _POOLED if len(pooled) > 1 else ():
        weights[f"{rate}/{POOLED}"] = {f"{rate}/{suite}": 1 / len(pooled) for suite in pooled}
    for suite, kinds in suites.items():
        if {"harmful", "lookalike"} <= kinds:
            weights[f"{CONTRAST}/{suite}"] = {f"{REFUSED.name}/{suite}": 1.0, f"{SAFE}/{suite}": -1.0}
    described_by = ((name, described(name)) for name in weights)
    return {name: replace(each, weights=weights[name]) for name, each in described_by if isinstance(each, Combined)}
