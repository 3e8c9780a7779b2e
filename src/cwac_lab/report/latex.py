"""The table of some runs for a paper: LaTeX with booktabs, best values bold, second ones underlined."""

from __future__ import annotations

import pandas as pd

from cwac_lab.evaluation.metrics import METRICS
from cwac_lab.report.grouping import SETTING, Row
from cwac_lab.report.tables import COUNTS, TITLES, filled, heading, ranked, summary

COLUMNS = ("harmful_score", "retained_refusals", "finetune_accuracy", "over_refusal")
_STYLE = ("textbf:--rwrap;", "underline:--rwrap;")


def latex(rows: list[Row]) -> str:
    """Return one ``table`` a setting, captioned by the weights that ran; it needs the packages booktabs and caption."""
    table = summary(rows)
    return "\n".join(_one(part) for _, part in table.groupby(SETTING, sort=False))


def _one(part: pd.DataFrame) -> str:
    ratios = ["--" if pd.isna(ratio) else f"{ratio:g}" for ratio in part["harmful_ratio"]]
    methods = (part["constraint"] + " " + part["variant"]).str.strip()
    methods += part["broken"].map(lambda told: f" (broken: {told})" if told else "")
    frame = pd.DataFrame({"$p$": ratios, "method": methods, "seeds": part["seeds"].astype(str)}, index=part.index)
    names = ["$p$", "method", "seeds"]
    for rate in COLUMNS:
        if TITLES[rate] not in filled(part):
            continue
        frame[TITLES[rate]], frame[COUNTS[rate]] = part[TITLES[rate]], part[COUNTS[rate]].astype(str)
        names += [_title(rate), "$n$"]
    styler = frame.style.hide(axis="index").format(escape="latex").relabel_index(names, axis="columns")
    for title, places in ranked(part).items():
        if title in frame:
            styles = [_STYLE[places[row]] if row in places else "" for row in frame.index]
            styler = styler.apply(lambda _, told=styles: told, subset=[title])
    caption = (
        f"{heading(part.iloc[0]).replace(' | ', '; ')}. Percent, mean over seeds and 95 % interval; n: prompts or rows "
        "that count for the rate before it. Bold: best at its ratio; underlined: second; the start and broken models, "
        "whose answers are incoherent too often, are left out."
    )
    return str(styler.to_latex(hrules=True, caption=_escape(caption), position="t", position_float="centering"))


def _title(rate: str) -> str:
    arrow = r"$\uparrow$" if METRICS[rate].higher_is_better else r"$\downarrow$"
    return f"{METRICS[rate].heading} {arrow}"


def _escape(text: str) -> str:
    return text.replace("_", r"\_").replace("%", r"\%").replace("&", r"\&")
