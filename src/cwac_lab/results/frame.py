"""All runs of a store as one table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from cwac_lab.core.errors import ConfigError, LabError, MissingAsset
from cwac_lab.results import store
from cwac_lab.results.store import Record


def load(output_root: str | Path = "outputs") -> pd.DataFrame:
    """Return one row a run, finished or not.

    Columns: ``run`` (folder name), ``status`` (``ok``, ``failed``, ``running``, ``interrupted``, ``unreadable``: broken
    or of another schema) and ``reason``; of finished runs also what ran (``weights``, ``model``, ``task``,
    ``constraint``, ``harmful_ratio``, ``seed``, ...), each rate in percent with ``_low``, ``_high`` (95 %) and ``_n``,
    ``judge`` and ``judge_version`` (whose verdicts the rates are), ``leak``, ``held_share``, ``broken``, ``seconds`` in
    total, ``peak_memory_gb``, ``trained_parameters``, and every setting by its dotted key
    (``constraint.weight.energy``). Where they were measured ``perplexity``, ``perplexity_start``, ``forgetting`` and
    ``lm_eval_TASK_METRIC``, each with the same endings. Of a judge beside the first ``version_JUDGE``,
    ``harmful_score_JUDGE``, ``harmfulness_JUDGE`` where it tells that, and Cohen's kappa with the first
    (``kappa_harmful_JUDGE``); of a run whose drift was measured ``drift_harmful_weight`` and the like (see
    ``diagnostics.linear.Drift``).

    Args:
        output_root: Folder that holds ``runs/``, an archive, or both.

    Raises:
        LabError: If the archive is damaged, or of a schema that cannot be read.
    """
    return pd.DataFrame([_row(run) for run in store.runs(Path(output_root))])


def _row(run: Record) -> dict[str, Any]:
    try:
        row: dict[str, Any] = {"run": run.path.name, "status": run.status, "reason": run.told().get("reason")}
        return row | (_measured(run.facts()) | _drift(run) | _settings(run) if row["status"] == "ok" else {})
    except LabError as error:
        return {"run": run.path.name, "status": "unreadable", "reason": str(error)}


def _measured(metrics: dict[str, Any]) -> dict[str, Any]:
    found = {name: metrics.get(name) for name in (*store.FACTS, "leak", "held_share", "broken")}
    for name, rate in metrics.items():
        if isinstance(rate, dict) and {"value", "low", "high", "n"} <= rate.keys():
            found |= {name: rate["value"], **{f"{name}_{part}": rate[part] for part in ("low", "high", "n")}}
    for judge, told in metrics["judges"].items():
        if "agreement" not in told:
            found |= {"judge": judge, "judge_version": told["version"]}
            continue
        found[f"version_{judge}"] = told["version"]
        for words in ("harmful", "harmless"):
            for part, value in told["agreement"][words].items():
                found[f"kappa_{words}_{judge}" + ("" if part == "kappa" else f"_{part}")] = value
        for rate in ("harmful_score", "harmfulness"):
            for part, value in told.get(rate, {}).items():
                found[f"{rate}_{judge}" + ("" if part == "value" else f"_{part}")] = value
    for task, told in metrics.get("lm_eval", {}).get("tasks", {}).items():
        for metric, rated in told.items():
            found |= {f"lm_eval_{task}_{metric}": rated["value"]}
            found |= {f"lm_eval_{task}_{metric}_{part}": rated[part] for part in ("low", "high", "n")}
    stages = metrics["stages"].values()
    found["trained_parameters"] = metrics.get("training", {}).get("trained_parameters")
    found["peak_memory_gb"] = max((stage["peak_memory_gb"] for stage in stages), default=None)
    return found | {"seconds": sum(stage["seconds"] for stage in stages)}


def _drift(run: Record) -> dict[str, Any]:
    """Return the means over layers of what was measured of a run's drift."""
    if not run.has(store.DRIFT):
        return {}
    try:
        summary = run.read(store.DRIFT)["summary"]
    except (OSError, ValueError, KeyError) as error:
        raise LabError(f"{run.path / store.DRIFT} cannot be read ({error})") from None
    return {f"drift_{kind}_{name}": value for kind, means in summary.items() for name, value in means.items()}


def _settings(run: Record) -> dict[str, Any]:
    try:
        return {key: value for key, value in store.flat(run.config()).items() if "." in key}
    except (OSError, ValueError) as error:
        raise LabError(f"{run.path / store.CONFIG} cannot be read ({error})") from None


def select(output_root: Path, name: str, query: str) -> list[Record]:
    """Return the runs of a store that a query over the columns of ``load`` holds for.

    Args:
        output_root: Folder that holds ``runs/``, an archive, or both.
        name: Of the query, for errors.
        query: As for ``pandas.DataFrame.query``; dotted columns in backticks.

    Raises:
        MissingAsset: If there is no run.
        ConfigError: If it is no such query.
    """
    frame = load(output_root)
    if frame.empty:
        raise MissingAsset(f"output_root={output_root}: no runs there; run `python -m cwac_lab.train` first")
    try:
        holds = frame.eval(query, engine="python")
        if not isinstance(holds, pd.Series) or holds.dtype != bool or len(holds) != len(frame):
            raise TypeError("not a condition on runs")
    except Exception as error:  # noqa: BLE001 - pandas raises whatever evaluating a wrong expression raises
        reason = " ".join(str(error).replace("BACKTICK_QUOTED_STRING_", "").replace("_DOT_", ".").split())
        raise ConfigError(name, query, f"a pandas query over the columns of results.load() ({reason})") from None
    chosen = set(frame["run"][holds])
    return [run for run in store.runs(output_root) if run.path.name in chosen]
