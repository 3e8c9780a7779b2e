"""The answers on which two runs differ, with both verdicts, and prompt and texts where these are kept."""

from __future__ import annotations

from collections.abc import Iterator

from cwac_lab.core.errors import LabError
from cwac_lab.evaluation.metrics import form_of, metric
from cwac_lab.report.grouping import SETTING, Row, word
from cwac_lab.report.rates import OF
from cwac_lab.results import store


def differing(entry: Row, pair: tuple[Row, Row], rate: str, items: list[tuple[str, str]]) -> Iterator[Row]:
    """Yield the items on which two runs differ, with both verdicts, and prompt and answers where they are kept."""
    said, given = ([_by_item(row, file, rate) for row in pair] for file in (store.VERDICTS, store.GENERATIONS))
    names = [row["constraint"] for row in pair]
    sides = names if names[0] != names[1] else [f"{name}_{number}" for number, name in enumerate(names, 1)]
    for item in items:
        verdicts, texts = ([side.get(item, {}) for side in both] for both in (said, given))
        asked = {"kind": item[0], "id": item[1], "form": form_of(verdicts[0])}
        of = {name: verdicts[0].get(name) or "" for name in ("suite", "category")}
        yield {
            **{key: entry[key] for key in (*SETTING, "harmful_ratio")}, "seed": pair[0]["seed"], "rate": rate,
            **asked, **of, "prompt": next((text["prompt"] for text in texts if text), ""),
            **{f"verdict_{side}": word(verdict) for side, verdict in zip(sides, verdicts, strict=True)},
            **{f"answer_{side}": text.get("output", "") for side, text in zip(sides, texts, strict=True)},
        }  # fmt: skip


def _by_item(run: Row, file: str, rate: str) -> dict[tuple[str, str], Row]:
    """Return the rows of a file of a run that a rate is taken over, by kind and id; none where it is not kept."""
    suite, verdicts = rate.partition(OF)[2], run["verdicts"]
    try:
        rows = verdicts if file == store.VERDICTS else run["run"].read(file)
        beside = list(zip(verdicts, rows, strict=True))
    except (LabError, OSError, ValueError):
        return {}
    return {
        (verdict["kind"], verdict["id"]): row
        for verdict, row in beside
        if form_of(verdict) == metric(rate).form and (verdict.get("suite") or "") == suite
    }
