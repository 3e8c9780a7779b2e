"""The files of a table and its figures: written where what they are made of has changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cwac_lab.core.cache import digest, file_digest, read_json, write_json, write_text
from cwac_lab.core.errors import MissingAsset
from cwac_lab.core.provenance import sources
from cwac_lab.results import store
from cwac_lab.results.store import RunFolder

NOTE = (
    "Rates in percent: mean over seeds, 95 % interval (Wilson; of several seeds a bootstrap over seeds and items where "
    "that is wider), n items, range over seeds. p: exact sign-flip test over items, Holm within a column and ratio."
)
_READ = (store.STATUS, store.CONFIG, store.METRICS, store.PROVENANCE, store.VERDICTS)


def _made_of(found: list[RunFolder]) -> str:
    """Return the hash of what a table is made of: the records, and this package, which makes it."""
    files = [run.path / name for run in found for name in _READ if run.has(name)]
    return digest([sources(), [str(file) for file in files], file_digest(files)])


def _made(stamp: Path) -> tuple[str, list[str]]:
    """Return what a table was made of, and its files; nothing where that is not known."""
    try:
        made = read_json(stamp)
        return str(made["of"]), list(made["files"])
    except (OSError, ValueError, TypeError, KeyError):
        return "", []


def write(root: Path, name: str, found: list[RunFolder], say: Callable[[str], None] = print) -> str:
    """Write the table of some runs (Markdown, CSV, LaTeX) and its figures (SVG, PNG), and return the first.

    What was made of the same records by the same code, and is all there, is left as it is.

    Args:
        root: Output folder; the files go to ``root/tables`` and ``root/figures``.
        name: Of the table.
        found: Run folders.
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


def _write(root: Path, name: str, found: list[RunFolder], say: Callable[[str], None]) -> list[Path]:
    from cwac_lab.report.figures import draw
    from cwac_lab.report.latex import latex
    from cwac_lab.report.paired import differences
    from cwac_lab.report.records import finished, records
    from cwac_lab.report.tables import averages, markdown, summary

    rows = records(found, say)
    if not finished(rows):
        raise MissingAsset(f"output_root={root}: no finished runs there; run `python -m cwac_lab.train` first")
    table = summary(rows, name)
    parts = [
        ("", table),
        ("Mean over tasks: ", averages(rows, name)),
        ("Paired differences in points: ", differences(rows)),
    ]
    texts = {
        "md": "\n".join(markdown(part, title) for title, part in parts if len(part)) + f"\n{NOTE}\n",
        "csv": table.to_csv(index=False),
        "tex": latex(rows),
    }
    for kind, text in texts.items():
        write_text(root / "tables" / f"{name}.{kind}", text)
    return [root / "tables" / f"{name}.{kind}" for kind in texts] + draw(rows, root / "figures", name)
