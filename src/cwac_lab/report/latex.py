"""The table of some runs for a paper: LaTeX with booktabs, best values bold, second ones underlined."""

from __future__ import annotations

from typing import Any

import pandas as pd

from cwac_lab.report.records import HIGHER_IS_BETTER, RATES, SETTING, Row, finished, grouped
from cwac_lab.report.tables import cell, heading, rate_of

COLUMNS = ("harmful_score", "finetune_accuracy", "over_refusal")
_STYLE = ("textbf:--rwrap;", "underline:--rwrap;")


def _ranks(entries: list[tuple[Row, list[Row]]], rate: str, *, more: bool) -> list[str]:
    """Return the style of every row: bold for the best value of its harmful ratio, underlined for the second.

    Start models and broken ones take no part: the one is no method, the other's rates mean nothing.
    """
    styles = [""] * len(entries)
    for ratio in {entry["harmful_ratio"] for entry, _ in entries}:
        values: dict[int, float] = {}
        for place, (entry, group) in enumerate(entries):
            value = rate_of(group, rate).value
            counts = entry["harmful_ratio"] == ratio and entry["constraint"] != "start"
            if counts and value is not None and not any(row["broken"] for row in finished(group)):
                values[place] = value
        for style, value in zip(_STYLE, sorted(set(values.values()), reverse=more), strict=False):
            for place, found in values.items():
                if found == value:
                    styles[place] = style
    return styles


def latex(rows: list[Row]) -> str:
    """Return one ``table`` a setting, captioned by the weights that ran; it needs the packages booktabs and caption."""
    settings: dict[tuple[Any, ...], list[tuple[Row, list[Row]]]] = {}
    for entry, group in grouped(rows):
        settings.setdefault(tuple(entry[key] for key in SETTING), []).append((entry, group))
    return "\n".join(_one(key, entries) for key, entries in settings.items())


def _one(key: tuple[Any, ...], entries: list[tuple[Row, list[Row]]]) -> str:
    frame = pd.DataFrame(
        {
            "$p$": ["--" if entry["harmful_ratio"] is None else f"{entry['harmful_ratio']:g}" for entry, _ in entries],
            "method": [" ".join([entry["constraint"], entry["variant"]]).strip() for entry, _ in entries],
            "seeds": [str(len(finished(group))) for _, group in entries],
        }
    )
    titles = {rate: _title(rate) for rate in COLUMNS}
    for rate, title in titles.items():
        frame[title] = [cell(group, rate) for _, group in entries]
    styler = frame.style.hide(axis="index").format(escape="latex")
    for rate, title in titles.items():
        styler = styler.apply(lambda _, r=rate: _ranks(entries, r, more=r in HIGHER_IS_BETTER), subset=[title])
    caption = f"{heading(dict(zip(SETTING, key, strict=True))).replace(' | ', '; ')}. Mean and 95 % interval."
    return str(styler.to_latex(hrules=True, caption=_escape(caption), position="t", position_float="centering"))


def _title(rate: str) -> str:
    arrow = r"$\uparrow$" if rate in HIGHER_IS_BETTER else r"$\downarrow$"
    return f"{RATES[rate]} {arrow}"


def _escape(text: str) -> str:
    return text.replace("_", r"\_").replace("%", r"\%").replace("&", r"\&")
