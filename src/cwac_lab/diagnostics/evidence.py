"""Which measurement of drift goes with the harmful score over all measured runs of a store."""

from __future__ import annotations

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.stats import rankdata

PREFIX = "drift_harmful_"
# Fewer runs say nothing; draws of the interval.
LEAST, DRAWS = 5, 2000


def _rho(x: Float[np.ndarray, "K N"], y: Float[np.ndarray, "K N"]) -> Float[np.ndarray, " K"]:
    """Return Spearman's correlation of each of K pairs of N values, NaN where one side is constant."""
    centred = []
    for ranks in (rankdata(x, axis=1), rankdata(y, axis=1)):
        centred.append(ranks - ranks.mean(1, keepdims=True))
    a, b = centred
    scale = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    return np.divide((a * b).sum(1), scale, out=np.full(len(scale), np.nan), where=scale > 0)


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
        drawn = pairs[source.integers(0, len(pairs), (DRAWS, len(pairs)))]
        low, high = np.nanpercentile(_rho(drawn[..., 0], drawn[..., 1]), [2.5, 97.5])
        rho = float(_rho(pairs[None, :, 0], pairs[None, :, 1])[0])
        found.append((str(name).removeprefix(PREFIX), rho, low, high, len(pairs)))
    table = pd.DataFrame(found, columns=["measurement", "rho", "low", "high", "n"])
    return table.sort_values("rho", key=lambda rho: -rho.abs(), ignore_index=True)
