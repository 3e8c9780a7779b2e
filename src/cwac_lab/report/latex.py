"""The table of some runs for a paper: LaTeX with booktabs, best values bold, second ones underlined."""

from __future__ import annotations

import pandas as pd

from cwac_lab.report import costs
from cwac_lab.report.costs import is_cost
from cwac_lab.report.grouping import SETTING, Row
from cwac_lab.report.layout import MEASURES, PLAIN, Layout
from cwac_lab.report.rates import count_title, title
from cwac_lab.report.tables import filled, heading, ranked, summary

COLUMNS = ("harmful_score", "retained_refusals", "finetune_accuracy", "over_refusal")
_STYLE = ("textbf:--rwrap;", "underline:--rwrap;")
# Signs that LaTeX reads as its own, or that its standard fonts print as another.
_SIGNS = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", '"': "''", "↑": r"$\uparrow$", "↓": r"$\downarrow$",
    "→": r"$\rightarrow$", "≤": r"$\leq$", "≥": r"$\geq$",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}  # fmt: skip


def latex(rows: list[Row], layout: Layout = PLAIN) -> str:
    """Return one ``table`` a setting, captioned by the weights that ran; it needs the package booktabs.

    Args:
        rows: Records.
        layout: Which columns, and in which order the rows; by default those of ``COLUMNS`` that any row has.
    """
    table, told = summary(rows, layout=layout), {cost.name: cost.title for cost in costs.known(rows)}
    return "\n".join(_one(part, layout, told) for _, part in table.groupby(SETTING, sort=False))


def escape(text: object) -> str:
    """Return a text that LaTeX prints as it stands; a sign that its Latin fonts lack is printed by its number."""
    return "".join(_SIGNS.get(sign) or (sign if sign <= "ÿ" else f"U+{ord(sign):04X}") for sign in str(text))


def _one(part: pd.DataFrame, layout: Layout, told: dict[str, str]) -> str:
    ratios = ["--" if pd.isna(ratio) else f"{ratio:g}" for ratio in part["harmful_ratio"]]
    methods = (part["constraint"] + " " + part["variant"]).str.strip()
    methods += part["broken"].map(lambda told: f" (broken: {told})" if told else "")
    frame = pd.DataFrame({"ratio": ratios, "method": methods, "seeds": part["seeds"]}, index=part.index)
    names = ["$p$", "method", "seeds"]
    there = filled(part, layout)
    for name in layout.columns or COLUMNS:
        if name in MEASURES:
            frame[name] = part[name]
            names.append(escape(name))
        elif is_cost(name):
            if name in told:
                frame[told[name]] = part[told[name]]
                names.append(escape(told[name]))
        elif title(name) in there:
            frame[title(name)], frame[count_title(name)] = part[title(name)], part[count_title(name)]
            names += [escape(title(name)), "$n$"]
    styler = frame.style.hide(axis="index").format(escape).relabel_index(names, axis="columns")
    for column, places in ranked(part).items():
        if column in frame:
            styles = [_STYLE[places[row]] if row in places else "" for row in frame.index]
            styler = styler.apply(lambda _, told=styles: told, subset=[column])
    caption = (
        f"{heading(part.iloc[0]).replace(' | ', '; ')}. Percent, mean over seeds and 95 % interval; n: prompts or rows "
        "that count for the rate before it. Bold: best at its ratio; underlined: second; the start and broken models, "
        "whose answers are incoherent too often, are left out."
    )
    return str(styler.to_latex(hrules=True, caption=escape(caption), position="t", position_float="centering"))
