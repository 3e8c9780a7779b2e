"""The comparison of two models as Markdown and as a page of its own: tables, and the prompts on which they differ."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment

from cwac_lab.core.cache import write_text
from cwac_lab.core.stats import Rate

FOLDER = "compare"
NOTE = (
    "Percent [95 % interval]; n: answers that count. Retained refusals: of the harmful prompts that the first model "
    "refuses, the share that the second one refuses too. Differences are paired by prompt, in points; p is the exact "
    "sign-flip test's and is not adjusted."
)
DRIFT_NOTE = (
    "KL: mean over prompts, from the first model to the second, with Student's interval. Weights: Frobenius norms over "
    "all tensors of a kind. n: prompts, or tensors."
)


@dataclass(frozen=True)
class Grid:
    """A table of texts: headings, rows, and what stands below."""

    title: str
    heads: tuple[str, ...]
    rows: list[list[str]]
    caption: str


@dataclass(frozen=True)
class Comparison:
    """What two models differ in.

    Attributes:
        title: Which models, in words.
        name: Of its files, by the content of the models.
        rates: Their rates beside one another.
        after: Rates of the second model, by name.
        broken: Whether one of the two babbles so much that its rates say nothing of safety.
        drift: How far the second one is from the first; without rows where that is not told.
        remarks: What is left out or taken on trust, each in a line.
        differing: Prompts with other verdicts: ``kind``, ``id``, ``form``, ``prompt``; and of ``before`` and ``after``
            the ``verdict`` and the ``output``.
    """

    title: str
    name: str
    rates: Grid
    after: dict[str, Rate]
    drift: Grid
    remarks: list[str] = field(default_factory=list)
    broken: bool = False
    differing: list[dict[str, Any]] = field(default_factory=list)

    @property
    def grids(self) -> list[Grid]:
        """The tables that have rows."""
        return [grid for grid in (self.rates, self.drift) if grid.rows]


def write(found: Comparison, root: Path) -> tuple[Path, Path]:
    """Write a comparison as Markdown and as a page under an output folder, and return where they are."""
    folder = root / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    files = folder / f"{found.name}.md", folder / f"{found.name}.html"
    for file, text in zip(files, (markdown(found), page(found)), strict=True):
        write_text(file, text)
    return files


def markdown(found: Comparison) -> str:
    """Return the tables as Markdown; prompts and answers are in the page only."""
    parts = [f"# {found.title}", *found.remarks]
    for grid in found.grids:
        rows = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (grid.heads, *grid.rows)]
        rows.insert(1, "|" + " --- |" * len(grid.heads))
        parts += [f"## {grid.title}", grid.caption, "\n".join(rows)]
    parts += [f"{len(found.differing)} prompts have another verdict: see the page beside this file."]
    return "\n\n".join(parts) + "\n"


def page(found: Comparison) -> str:
    """Return the page, which loads nothing; harmful prompts are blurred until they are clicked."""
    here = resources.files("cwac_lab.report")
    template = Environment(autoescape=True).from_string(here.joinpath("compared.html.j2").read_text(encoding="utf-8"))
    return template.render(found=found, style=here.joinpath("page.css").read_text(encoding="utf-8"))
