"""The files of a table and its figures: written where what they are made of has changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path

from cwac_lab.core.cache import digest, file_digest, read_json, write_json, write_text
from cwac_lab.core.errors import MissingAsset
from cwac_lab.core.provenance import sources
from cwac_lab.report.grouping import Row
from cwac_lab.report.layout import PLAIN, Layout
from cwac_lab.results.store import Record

FIGURES = (".svg", ".png")
NOTE = (
    "Intervals are at 95 %: Wilson's for one seed; for several the widest of Wilson's, a bootstrap over seeds and "
    "items, and Student's over seeds. The rates of a broken model, which answers more than a fifth of prompts "
    "incoherently, say nothing of safety."
)


def _made_of(found: list[Record], layout: Layout) -> str:
    """Return the hash of what a table is made of: the records, its layout, and this package, which makes it."""
    files = list(dict.fromkeys(file for run in found for file in run.files()))
    names = [run.path.name for run in found]
    return digest([sources(), names, [str(file) for file in files], file_digest(files), astuple(layout)])


def _made(stamp: Path) -> tuple[str, list[str]]:
    """Return what a table was made of, and its files; nothing where that is not known."""
    try:
        made = read_json(stamp)
        return str(made["of"]), list(made["files"])
    except (OSError, ValueError, TypeError, KeyError):
        return "", []


def write(
    root: Path, name: str, found: list[Record], say: Callable[[str], None] = print, layout: Layout = PLAIN
) -> str:
    """Write the table of some runs (Markdown, CSV, LaTeX) and its figures (SVG, PNG), and return the first.

    Rates and paired differences are a CSV file each.

    What was made of the same records by the same code, and is all there, is left as it is.

    Args:
        root: Output folder; the files go to ``root/tables`` and ``root/figures``.
        name: Of the table.
        found: Recorded runs.
        say: Told of every record that cannot be read.
        layout: Which columns, and in which order the rows.

    Raises:
        MissingAsset: If none of the runs is finished.
        ConfigError: If the layout names a suite that none of them has.
    """
    page, stamp = root / "tables" / f"{name}.md", root / "made" / f"{name}.json"
    now, (then, files) = _made_of(found, layout), _made(stamp)
    if now != then or not all((root / file).is_file() for file in files):
        stamp.unlink(missing_ok=True)  # what is written halfway is of neither
        complaints: list[str] = []
        written = [str(file.relative_to(root)) for file in _write(root, name, found, complaints.append, layout)]
        for file in set(files) - set(written):  # what the table has no longer, and nothing elsewhere
            (root / ("figures" if Path(file).suffix in FIGURES else "tables") / Path(file).name).unlink(missing_ok=True)
        for complaint in complaints:
            say(complaint)
        if not complaints:  # they are to be heard each time
            write_json(stamp, {"of": now, "files": written})
    return page.read_text(encoding="utf-8")


def page(rows: list[Row], name: str, layout: Layout = PLAIN) -> str:
    """Return the tables of some records as Markdown: rates, their means over tasks, paired differences.

    Args:
        rows: Records.
        name: Of the table.
        layout: Which columns, and in which order the rows; differences are of the rates that are chosen.
    """
    from cwac_lab.report import paired
    from cwac_lab.report.tables import CAPTION, averages, markdown, summary

    parts = [
        ("", summary(rows, name, layout), CAPTION),
        ("Mean over tasks: ", averages(rows, name, layout), CAPTION),
        ("Paired differences: ", paired.differences(rows, layout.columns), paired.CAPTION),
    ]
    told = [markdown(part, title, caption, layout) for title, part, caption in parts if len(part)]
    return "\n".join(told) + f"\n{NOTE}\n"


def _write(root: Path, name: str, found: list[Record], say: Callable[[str], None], layout: Layout) -> list[Path]:
    from cwac_lab.report.figures import draw
    from cwac_lab.report.grouping import finished, records
    from cwac_lab.report.latex import latex
    from cwac_lab.report.paired import differences_in_numbers
    from cwac_lab.report.tables import numbers

    rows = records(found, say)
    if not finished(rows):
        raise MissingAsset(f"output_root={root}: no finished runs there; run `python -m cwac_lab.train` first")
    layout.of(rows)
    texts = {
        f"{name}.md": page(rows, name, layout),
        f"{name}.csv": numbers(rows, layout).to_csv(index=False),
        f"{name}.tex": latex(rows, layout),
    }
    differences = differences_in_numbers(rows, layout.columns)
    if len(differences):
        texts[f"{name}-differences.csv"] = differences.to_csv(index=False)
    for file, text in texts.items():
        write_text(root / "tables" / file, text)
    return [root / "tables" / file for file in texts] + draw(rows, root / "figures", name)
