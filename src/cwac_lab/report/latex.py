"""The table of some runs for a paper: LaTeX with booktabs, best values bold, second ones underlined."""

from __future__ import annotations

from statistics import mean
from typing import Any

import pandas as pd

from cwac_lab.report.tables import SETTING, cell, grouped

# Column: rate, title, and whether more is better.
COLUMNS = {
    "harmful_score": (r"HS $\downarrow$", False),
    "finetune_accuracy": (r"FA $\uparrow$", True),
    "over_refusal": (r"over-refusal $\downarrow$", False),
}
_STYLE = ("textbf:--rwrap;", "underline:--rwrap;")


def _ranks(entries: list[tuple[dict[str, Any], list[dict[str, Any]]]], rate: str, *, more: bool) -> list[str]:
    """Return the style of every row: bold for the best value of its harmful ratio, underlined for the second.

    Start models and broken ones take no part: the one is no method, the other's rates mean nothing.
    """
    styles = [""] * len(entries)
    for ratio in {entry["harmful_ratio"] for entry, _ in entries}:
        values: dict[int, float] = {}
        for place, (entry, group) in enumerate(entries):
            known = [row[rate]["value"] for row in group if row[rate]["value"] is not None]
            counts = entry["harmful_ratio"] == ratio and entry["constraint"] != "start"
            if counts and known and not any(row["broken"] for row in group):
                values[place] = mean(known)
        for style, value in zip(_STYLE, sorted(set(values.values()), reverse=more), strict=False):
            for place, found in values.items():
                if found == value:
                    styles[place] = style
    return styles


def latex(rows: list[dict[str, Any]]) -> str:
    """Return one ``table`` a setting, captioned by the weights that ran; it needs the packages booktabs and caption."""
    settings: dict[tuple[Any, ...], list[tuple[dict[str, Any], list[dict[str, Any]]]]] = {}
    for entry, group in grouped(rows):
        settings.setdefault(tuple(entry[key] for key in SETTING), []).append((entry, group))
    return "\n".join(_one(key, entries) for key, entries in settings.items())


def _one(key: tuple[Any, ...], entries: list[tuple[dict[str, Any], list[dict[str, Any]]]]) -> str:
    frame = pd.DataFrame(
        {
            "$p$": ["--" if entry["harmful_ratio"] is None else f"{entry['harmful_ratio']:g}" for entry, _ in entries],
            "method": [_escape(" ".join([entry["constraint"], entry["variant"]]).strip()) for entry, _ in entries],
            "seeds": [str(len(group)) for _, group in entries],
        }
    )
    for rate, (title, _) in COLUMNS.items():
        frame[title] = [cell([row[rate] for row in group]) for _, group in entries]
    styler = frame.style.hide(axis="index")
    for rate, (title, more) in COLUMNS.items():
        styler = styler.apply(lambda _, r=rate, m=more: _ranks(entries, r, more=m), subset=[title])
    weights, content, task, data, split = key
    caption = f"{weights} ({str(content)[:8]}); {task}, {data} data, {split} split. Mean and 95 % interval."
    return str(styler.to_latex(hrules=True, caption=_escape(caption), position="t", position_float="centering"))


def _escape(text: str) -> str:
    return text.replace("_", r"\_").replace("%", r"\%").replace("&", r"\&")
