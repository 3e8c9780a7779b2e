"""Figures of a table: the trade-off of HS and FA with its Pareto front, and curves over what a grid varies."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cwac_lab.core.cache import digest
from cwac_lab.report.course import FIELDS, followed
from cwac_lab.report.grouping import SETTING, Row, finished, grouped, has_rate
from cwac_lab.report.tables import heading, rate_of
from cwac_lab.results.store import COURSE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Cells = list[tuple[Row, list[Row]]]
Lines = dict[str, list[tuple[float, list[Row]]]]
_PANELS = {"harmful_score": "harmful score (%), lower is better", "finetune_accuracy": "accuracy (%), higher is better"}
_RETAINED = {"retained_refusals": "retained refusals (%), higher is better"}
# Okabe and Ito's palette: told apart by colour-blind readers too.
_COLOURS = ("#000000", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c8c00")
_MARKERS = "osD^vP*X"
# The parts of a layer's change (``diagnostics.linear.Drift``).
PARTS = {"weight": "dW h0", "activation": "W0 dh", "cross": "dW dh", "total": "in all"}
# Letters of a title to an inch.
_LETTERS = 16
_STYLE: Any = {"svg.hashsalt": "cwac-lab", "svg.fonttype": "none", "font.size": 9.0, "axes.spines.top": False,
          "axes.spines.right": False}  # fmt: skip


def _name(entry: Row) -> str:
    return " ".join(filter(None, (str(entry["constraint"]), str(entry["variant"]))))


def _broken(group: list[Row]) -> bool:
    return any(row["broken"] for row in group)


def pareto(points: list[tuple[float, float]]) -> list[int]:
    """Return the places of the points (HS, FA) on the front: no other point is as good in both, and better in one."""
    front, best = [], float("-inf")
    for place in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[place][1] > best:
            best = points[place][1]
            front.append(place)
    return front


def _errors(rate: Any) -> list[list[float]]:
    return [[max(0.0, rate.value - rate.low)], [max(0.0, rate.high - rate.value)]]


def _is_placed(group: list[Row]) -> bool:
    """Tell whether a method has both rates of a trade-off: some tasks have no accuracy, broken models no HS."""
    return all(rate_of(group, name).value is not None for name in _PANELS)


def trade_off(axes: Axes, cells: Cells) -> None:
    """Draw FA against HS of every method at one harmful ratio; broken models are hollow and on no front."""
    sound: list[tuple[float, float]] = []
    for number, (entry, group) in enumerate(cells):
        harm, right = (rate_of(group, name) for name in _PANELS)
        if harm.value is None or right.value is None:
            continue
        colour, marker = _COLOURS[number % len(_COLOURS)], _MARKERS[number // len(_COLOURS) % len(_MARKERS)]
        axes.errorbar(
            harm.value, right.value, xerr=_errors(harm), yerr=_errors(right), label=_name(entry), fmt=marker,
            color=colour, markerfacecolor="none" if _broken(group) else colour, capsize=2, linewidth=0.8, markersize=5,
        )  # fmt: skip
        if not _broken(group):
            sound.append((harm.value, right.value))
    front = [sound[place] for place in pareto(sound)]
    axes.step([x for x, _ in front], [y for _, y in front], where="post", color="0.6", linestyle=":", zorder=0)
    axes.set_xlabel(_PANELS["harmful_score"])
    axes.set_ylabel(_PANELS["finetune_accuracy"])


def curves(figure: Figure, lines: Lines, label: str) -> None:
    """Draw HS and FA over a setting, and retained refusals where a run has them, a line a method.

    Bands are 95 % intervals, crosses broken models.
    """
    groups = [group for points in lines.values() for _, group in points]
    panels = _PANELS | (_RETAINED if any(has_rate(group, *_RETAINED) for group in groups) else {})
    figure.set_size_inches(3.6 * len(panels), 3.6)
    for axes, (name, title) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for number, (method, points) in enumerate(lines.items()):
            rates = [(x, rate_of(group, name)) for x, group in sorted(points, key=lambda point: point[0])]
            known = [(x, rate.value, rate.low, rate.high) for x, rate in rates if rate.value is not None]
            if known:
                xs, values, lows, highs = zip(*known, strict=True)
                colour = _COLOURS[number % len(_COLOURS)]
                marker = _MARKERS[number // len(_COLOURS) % len(_MARKERS)]
                axes.plot(xs, values, marker=marker, color=colour, label=method, markersize=4)
                broken = [(x, rate_of(group, name).value) for x, group in points if _broken(group)]
                if broken:
                    axes.plot(*zip(*broken, strict=True), "x", color=colour, markersize=9)
                axes.fill_between(xs, lows, highs, color=colour, alpha=0.15, linewidth=0)
        _ticks(axes, sorted({x for points in lines.values() for x, _ in points}))
        axes.set_xlabel(label)
        axes.set_title(title, fontsize=9)
        axes.set_ylim(-3, 103)


def course(figure: Figure, cells: Cells) -> None:
    """Draw refusals, and how far first tokens are from the start's, over steps: a line a run, a colour a method."""
    figure.set_size_inches(3.6 * len(FIELDS), 3.6)
    for axes, (field, title) in zip(figure.subplots(1, len(FIELDS)), FIELDS.items(), strict=True):
        for number, (entry, group) in enumerate(cells):
            colour = _COLOURS[number % len(_COLOURS)]
            for at, row in enumerate(_followed(group)):
                seen = followed(row["run"])
                known = [at for at in zip(seen["step"], seen[field], strict=True) if at[1] is not None]
                axes.plot(*zip(*known, strict=True), marker=".", color=colour, label="" if at else _name(entry))
        axes.set_xlabel("optimizer steps")
        axes.set_title(title, fontsize=9)
        axes.set_ylim(bottom=0)


def _followed(group: list[Row]) -> list[Row]:
    return [row for row in group if row["run"].has(COURSE)]


# As many values as an axis names one by one, and the share of its length below which two names lie aslant.
_NAMED, _NEAR = 8, 0.12


def _ticks(axes: Axes, values: Sequence[float]) -> None:
    """Name the values that were run, on a logarithmic axis where they are far apart."""
    apart = values[0] > 0 and values[-1] >= 20 * values[0]
    if apart:
        axes.set_xscale("log")
    if len(values) > _NAMED:
        return
    axes.set_xticks(values, [f"{value:g}" for value in values], fontsize=8)
    axes.set_xticks([], minor=True)
    steps = [after - before for before, after in pairwise(values)]
    if not apart and min(steps, default=1.0) < _NEAR * (values[-1] - values[0]):
        axes.tick_params("x", rotation=45)


def _lines(cells: Cells) -> Iterator[tuple[str, Lines]]:
    """Yield what was varied, the harmful ratio or a numeric setting, and a line for every way to hold all else."""
    ratios: Lines = {}
    settings: dict[str, Lines] = {}
    for entry, group in cells:
        ratios.setdefault(_name(entry), []).append((entry["harmful_ratio"], group))
        varied = group[0]["varied"]
        for key, value in varied.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                rest = [f"{other}={varied[other]}" for other in varied if other != key]
                name = ", ".join([str(entry["constraint"]), f"p={entry['harmful_ratio']:g}", *rest])
                settings.setdefault(key, {}).setdefault(name, []).append((float(value), group))
    for label, lines in {"harmful ratio": ratios, **settings}.items():
        long = {name: points for name, points in lines.items() if len(points) > 1}
        if long:
            yield label, long


def drift_map(found: dict[str, Any]) -> Figure:
    """Draw the parts of the change of every layer, a row a part, for both kinds of prompts; of a run's drift record."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    parts = {kind: [[layer[part] for layer in layers] for part in PARTS] for kind, layers in found["layers"].items()}
    most = max(max(map(max, rows)) for rows in parts.values())
    with rc_context(_STYLE):
        figure = Figure(figsize=(7.2, 3.2), layout="constrained")
        panels = figure.subplots(len(parts), 1, sharex=True)
        for axes, (kind, rows) in zip(panels, parts.items(), strict=True):
            image = axes.imshow(rows, aspect="auto", vmin=0.0, vmax=most, cmap="viridis")
            axes.set_yticks(range(len(PARTS)), list(PARTS.values()))
            axes.set_title(f"{kind} prompts (n={found['prompts'][kind]})", fontsize=9)
        panels[-1].set_xlabel("layer")
        figure.colorbar(image, ax=list(panels), label="relative to ||W0 h0||")
    return figure


def draw(rows: list[Row], folder: Path, name: str) -> list[Path]:
    """Write the figures of a table as SVG and PNG; returns the files.

    One setting (weights, task, data, split) is one set of figures: ``NAME-TASK-KEY-trade_off-pRATIO`` for every harmful
    ratio at which two methods or more have both rates, ``...-over-SETTING`` for whatever a method was run at several
    values of, and ``...-course`` where runs were followed while they were trained.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    settings: dict[tuple[Any, ...], Cells] = {}
    for entry, group in grouped(rows):
        if entry["constraint"] != "start" and finished(group):
            settings.setdefault(tuple(entry[key] for key in SETTING), []).append((entry, finished(group)))
    written = []
    for key, cells in settings.items():
        title = heading(cells[0][0]).replace(" | ", "\n")
        # Prompts were dealt by exact text before there was another rule: figures of then keep their names.
        named = [value for part, value in zip(SETTING, key, strict=True) if (part, value) != ("dealt", "exact")]
        stem = f"{name}-{cells[0][0]['task']}-{digest(named)[:8]}"
        with rc_context(_STYLE):
            for ratio in sorted({entry["harmful_ratio"] for entry, _ in cells}):
                alike = [cell for cell in cells if cell[0]["harmful_ratio"] == ratio]
                if sum(_is_placed(group) for _, group in alike) > 1:
                    figure = Figure(figsize=(5.6, 4.4), layout="constrained")
                    trade_off(figure.subplots(), alike)
                    file = folder / f"{stem}-trade_off-p{ratio:g}"
                    written += _save(figure, f"{title}, harmful ratio {ratio:g}", file)
            if watched := [cell for cell in cells if _followed(cell[1])]:
                figure = Figure(layout="constrained")
                course(figure, watched)
                written += _save(figure, title, folder / f"{stem}-course")
            for label, lines in _lines(cells):
                figure = Figure(layout="constrained")
                curves(figure, lines, label)
                written += _save(figure, title, folder / f"{stem}-over-{label.replace(' ', '_')}")
    return written


def _save(figure: Figure, title: str, stem: Path) -> list[Path]:
    """Add title and legend (below the panels, which would hide points otherwise) and write both kinds of file."""
    width = int(_LETTERS * figure.get_figwidth())
    figure.suptitle("\n".join(textwrap.fill(line, width) for line in title.splitlines()), fontsize=8)
    handles, labels = figure.axes[-1].get_legend_handles_labels()
    if handles:
        columns = 2 if max(map(len, labels)) < 32 else 1
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=7)
    stem.parent.mkdir(parents=True, exist_ok=True)
    files = [stem.with_name(f"{stem.name}.{kind}") for kind in ("svg", "png")]
    for file in files:
        # The date would make two figures of the same runs differ.
        figure.savefig(file, dpi=150, metadata={"Date": None} if file.suffix == ".svg" else {"Software": None})
    return files
