"""Which measurement of drift goes with the harmful score over all measured runs of a store."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

PREFIX = "drift_harmful_"
# Fewer runs say nothing; draws of the interval.
LEAST, DRAWS = 5, 2000


def _rho(x: np.ndarray, y: np.ndarray) -> float:
    """Return Spearman's correlation, NaN where one side is constant."""
    return float(spearmanr(x, y).statistic) if len(set(x)) > 1 and len(set(y)) > 1 else float("nan")


def correlations(frame: pd.DataFrame, rate: str = "harmful_score") -> pd.DataFrame:
    """Return Spearman's rank correlation of every measurement with a rate, over runs, strongest first.

    The interval is that of a percentile bootstrap over runs (95 %); runs of one start and task are no independent
    sample of all models, so it says how much hangs on single runs, no more. Broken models and unmeasured runs are left
    out. Runs judged by different versions are correlated apart, and the measurement then names the version.

    Args:
        frame: As ``cwac_lab.results.load`` returns it.
        rate: Column of the rate.

    Returns:
        Columns ``measurement``, ``rho``, ``low``, ``high``, ``n``; empty with fewer than ``LEAST`` runs.
    """
    by = ["judge", "judge_version"]
    if set(by) <= set(frame) and len(frame[by].dropna().drop_duplicates()) > 1:
        parts = []
        for (judge, version), part in frame.groupby(by):
            table = correlations(part.drop(columns=by), rate)
            parts.append(table.assign(measurement=table["measurement"] + f", judged by {judge} {str(version)[:8]}"))
        return pd.concat(parts, ignore_index=True)
    found = []
    usable = frame[frame["broken"].eq(False) & frame[rate].notna()] if {"broken", rate} <= set(frame) else frame[:0]
    source = np.random.default_rng(0)
    for name in (name for name in usable if str(name).startswith(PREFIX)):
        pairs = usable[[name, rate]].dropna().to_numpy(float)
        if len(pairs) < LEAST:
            continue
        draws = [_rho(*pairs[source.integers(0, len(pairs), len(pairs))].T) for _ in range(DRAWS)]
        low, high = np.nanpercentile(draws, [2.5, 97.5])
        found.append((str(name).removeprefix(PREFIX), _rho(*pairs.T), low, high, len(pairs)))
    table = pd.DataFrame(found, columns=["measurement", "rho", "low", "high", "n"])
    return table.sort_values("rho", key=lambda rho: -rho.abs(), ignore_index=True)
