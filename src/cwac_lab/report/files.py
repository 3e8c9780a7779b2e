"""The files of a table and its figures: written where what they are made of has changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cwac_lab.core.cache import digest, file_digest, read_json, write_json, write_text
from cwac_lab.core.errors import MissingAsset
from cwac_lab.core.provenance import sources
from cwac_lab.report.grouping import Row
from cwac_lab.results.store import Record

NOTE = (
    "Intervals are at 95 %: Wilson's for one seed; for several the widest of Wilson's, a bootstrap over seeds and "
    "items, and Student's over seeds. The rates of a broken model, which answers more than a fifth of prompts "
    "incoherently, say nothing of safety."
)


def _made_of(found: list[Record]) -> str:
    """Return the hash of what a table is made of: the records, and this package, which makes it."""
    files = list(dict.fromkeys(file for run in found for file in run.files()))
    names = [run.path.name for run in found]
    return digest([sources(), names, [str(file) for file in files], file_digest(files)])


def _made(stamp: Path) -> tuple[str, list[str]]:
    """Return what a table was made of, and its files; nothing where that is not known."""
    try:
        made = read_json(stamp)
        return str(made["of"]), list(made["files"])
    except (OSError, ValueError, TypeError, KeyError):
        return "", []


def write(root: Path, name: str, found: list[Record], say: Callable[[str], None] = print) -> str:
    """Write the table of some runs (Markdown, CSV, LaTeX) and its figures (SVG, PNG), and return the first.

    What was made of the same records by the same code, and is all there, is left as it is.

    Args:
        root: Output folder; the files go to ``root/tables`` and ``root/figures``.
        name: Of the table.
        found: Recorded runs.
        say: Told of every record that cannot be read.

    Raises:
        MissingAsset: If none of the runs is finished.
    """
    page, stamp = root / "tables" / f"{name}.md", root / "made" / f"{name}.json"
    now, (then, files) = _made_of(found), _made(stamp)
    if now != then or not all((root / file).is_file() for file in files):
        stamp.unlink(missing_ok=True)  # what is written halfway is of neither
        complaints: list[str] = []
        written = [str(file.relative_to(root)) for file in _write(root, name, found, complaints.append)]
        for file in set(files) - set(written):  # figures that the table has no longer, and nothing elsewhere
            (root / "figures" / Path(file).name).unlink(missing_ok=True)
        for complaint in complaints:
            say(complaint)
        if not complaints:  # they are to be heard each time
            write_json(stamp, {"of": now, "files": written})
    return page.read_text(encoding="utf-8")


def page(rows: list[Row], name: str) -> str:
    """Return the tables of some records as Markdown: rates, their means over tasks, paired differences.

    Args:
        rows: Records.
        name: Of the table.
    """
    from cwac_lab.report import paired
    from cwac_lab.report.tables import CAPTION, averages, markdown, summary

    parts = [
        ("", summary(rows, name), CAPTION),
        ("Mean over tasks: ", averages(rows, name), CAPTION),
        ("Paired differences: ", paired.differences(rows), paired.CAPTION),
    ]
    return "\n".join(markdown(part, title, caption) for title, part, caption in parts if len(part)) + f"\n{NOTE}\n"


def _write(root: Path, name: str, found: list[Record], say: Callable[[str], None]) -> list[Path]:
    from cwac_lab.report.figures import draw
    from cwac_lab.report.grouping import finished, records
    from cwac_lab.report.latex import latex
    from cwac_lab.report.tables import numbers

    rows = records(found, say)
    if not finished(rows):
        raise MissingAsset(f"output_root={root}: no finished runs there; run `python -m cwac_lab.train` first")
    texts = {"md": page(rows, name), "csv": numbers(rows).to_csv(index=False), "tex": latex(rows)}
    for kind, text in texts.items():
        write_text(root / "tables" / f"{name}.{kind}", text)
    return [root / "tables" / f"{name}.{kind}" for kind in texts] + draw(rows, root / "figures", name)
