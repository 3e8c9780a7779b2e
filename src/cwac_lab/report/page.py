"""One page about all runs of a store: tables, figures to explore, drift, answers; self-contained, it loads nothing."""

from __future__ import annotations

import base64
import csv
import gzip
import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import Environment

from cwac_lab.core.cache import shortened, write_text
from cwac_lab.core.errors import LabError, MissingAsset
from cwac_lab.evaluation.combined import described
from cwac_lab.report.course import FIELDS, followed
from cwac_lab.report.figures import PARTS
from cwac_lab.report.files import NOTE
from cwac_lab.report.grouping import SETTING, Row, finished, records, said
from cwac_lab.report.paired import CAPTION as PAIRED
from cwac_lab.report.paired import differences
from cwac_lab.report.points import categories, points, rates, short
from cwac_lab.report.rates import known
from cwac_lab.report.tables import CAPTION, column_title, filled, heading, ranked, summary
from cwac_lab.results import store
from cwac_lab.results.store import Record

T = TypeVar("T")
FILE = Path("report") / "index.html"
# Points of a training curve at most.
POINTS = 120
SCRIPTS = ("page.js", "trade.js", "two.js")


def _tables(rows: list[Row]) -> list[dict[str, Any]]:
    """Return the tables as headings, columns and cells, without empty columns: rates, then paired differences."""
    found = []
    shares = summary(rows)
    for words, frame, caption in (("Rates", shares, CAPTION), ("Paired differences", differences(rows), PAIRED)):
        best = ranked(frame) if frame is shares else {}
        for keys, part in frame.groupby([name for name in SETTING if name in frame], sort=False) if len(frame) else ():
            shown = part.drop(columns=[name for name in SETTING if name in part]).astype(object).fillna("").astype(str)
            shown = shown[filled(shown)]
            cells = [
                [{"text": row[name], "best": best.get(name, {}).get(at) == 0} for name in shown.columns]
                for at, row in shown.iterrows()
            ]
            told = {"title": f"{words}: {heading(part.iloc[0])}", "caption": caption, "key": str(keys)}
            found.append({**told, "columns": [column_title(name) for name in shown.columns], "rows": cells})
    return found


def _curve(run: Record) -> dict[str, list[Any]]:
    """Return the logged losses of a run's first log, thinned to ``POINTS`` steps."""
    path = run.path / "log" / "metrics.csv"
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    every = max(1, -(-len(rows) // POINTS))
    losses = [name for name in rows[0] if name.startswith("loss/")] if rows else []
    kept = rows[::every]
    columns = {name: [short(float(row[name])) if row[name] else None for row in kept] for name in losses}
    return {"step": [int(float(row["step"])) for row in kept], **columns} if losses else {}


def _drift(run: Record) -> dict[str, Any]:
    """Return by kind of prompts the parts of the change of every layer, and the means over layers."""
    if not run.has(store.DRIFT):
        return {}
    found = run.read(store.DRIFT)
    layers = {
        kind: {term: [short(layer[term]) for layer in drifts] for term in PARTS}
        for kind, drifts in found["layers"].items()
    }
    means = {kind: {k: short(v) for k, v in values.items()} for kind, values in found["summary"].items()}
    return {"layers": layers, "means": means, "n": found["prompts"]}


def _course(run: Record) -> dict[str, list[Any]]:
    """Return how refusals went while a run was trained."""
    return {name: [None if at is None else short(at) for at in values] for name, values in followed(run).items()}


def _answers(run: Record) -> list[dict[str, Any]]:
    """Return the verdicts of all judges of a run on every answer, with prompt, answer and reasons where texts are kept.

    Nothing where the run failed or no verdicts are kept.
    """
    if run.status != "ok" or not run.has(store.VERDICTS):
        return []
    rows = said(run)
    if not run.has(store.GENERATIONS):
        return [{name: value for name, value in row.items() if name != "reasons"} for row in rows]
    texts = [{key: row[key] for key in ("prompt", "output")} for row in run.read(store.GENERATIONS)]
    return [verdicts | text for verdicts, text in zip(rows, texts, strict=True)]


def _packed(rows: list[dict[str, Any]]) -> str:
    """Return rows as base64 of gzipped JSON, which the page unpacks when they are looked at."""
    return base64.b64encode(gzip.compress(json.dumps(rows).encode(), mtime=0)).decode() if rows else ""


def _kept(read: Callable[[Record], T], run: Record, say: Callable[[str], None]) -> T | None:
    """Return what is read of a run's folder, or None where a file is broken, which is told."""
    try:
        return read(run)
    except (LabError, OSError, ValueError, KeyError) as error:
        say(f"left out: {run.path.name}: {error}")
        return None


def _run(row: Row, say: Callable[[str], None]) -> dict[str, Any]:
    run: Record = row["run"]
    facts = {name: row[name] for name in store.FACTS if name != "weights_content"}
    provenance = run.provenance()
    answers = _kept(_answers, run, say) or []
    told = ("git_commit", "git_dirty", "python", "platform", "devices", "weights_content", "base_content")
    return {
        "name": run.path.name,
        "facts": {**facts, "weights content": shortened(str(row["weights_content"])), "judged by": row["judge"]},
        "setting": heading(row),
        "failed": row.get("failed"),
        "rates": {
            described(name).heading: {part: short(value) for part, value in row[name].items()}
            for name in known([row])
            if isinstance(row.get(name), dict)
        },
        "judges": {
            f"{name} {told['version'][:8]}": {words: told["agreement"][words] for words in ("harmful", "harmless")}
            for name, told in row.get("judges", {}).items()
            if "agreement" in told
        },
        "settings": {key: _plain(value) for key, value in row["config"].items()},
        "provenance": {name: provenance[name] for name in told if name in provenance} | provenance.get("packages", {}),
        "drift": _kept(_drift, run, say) or {},
        "curve": _kept(_curve, run, say) or {},
        "course": _kept(_course, run, say) or {},
        "answers": _packed(answers),
        "texts": any("output" in answer for answer in answers),
    }


def _plain(value: Any) -> Any:
    """Return a setting as it is shown: what is no number or text as JSON."""
    return value if value is None or isinstance(value, (bool, int, float, str)) else json.dumps(value)


def _json(value: Any) -> str:
    """Return JSON that may stand inside a script element."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def render(found: list[Record], say: Callable[[str], None] = print) -> str:
    """Return the page of some runs.

    Args:
        found: Recorded runs.
        say: Told of every record that cannot be read.

    Raises:
        MissingAsset: If none is finished.
    """
    from plotly.offline import get_plotlyjs

    rows = records(found, say)
    if not finished(rows):
        raise MissingAsset("no finished runs; run `python -m cwac_lab.train` first")
    tables, cells = _tables(rows), points(rows)  # which tell every row its variant
    here = resources.files("cwac_lab.report")
    template = Environment(autoescape=True).from_string(here.joinpath("page.html.j2").read_text(encoding="utf-8"))
    return template.render(
        tables=tables,
        note=NOTE,
        n_runs=len(rows),
        followed=FIELDS,
        weights=sorted({str(row["weights"]) for row in rows}),
        data=_json(
            {
                "cells": cells,
                "rates": rates(rows),
                "suites": categories(rows),
                "runs": [_run(row, say) for row in rows],
            }
        ),
        plotly=get_plotlyjs(),
        style=here.joinpath("page.css").read_text(encoding="utf-8"),
        scripts=[here.joinpath(name).read_text(encoding="utf-8") for name in SCRIPTS],
    )


def write(root: Path, say: Callable[[str], None] = print) -> Path:
    """Write the page of all runs under an output folder and return where it is.

    Raises:
        MissingAsset: If there is no finished run.
    """
    page = root / FILE
    write_text(page, render(list(store.runs(root)), say))
    return page
