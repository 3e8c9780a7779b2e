"""Documents of plain text, to measure language on that no task asks for: the project's own, or a file of a user's."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from cwac_lab.core.cache import digest
from cwac_lab.core.errors import LabError, MissingAsset
from cwac_lab.data.reading import CODECS, SUFFIXES, kind_of, read_rows

# The documents that travel with the package; the head of the file says where they are from.
OWN = "plain_text.yaml"
# The column of a file of rows that holds a document.
COLUMN = "text"


def documents(file: str | None) -> list[str]:
    """Return the documents of a file, or those that travel with the package.

    Args:
        file: A text file, whose documents stand between blank lines, or a file of rows with a column ``text``.

    Raises:
        MissingAsset: If it is not there.
        LabError: If it has no documents, or one of less than two words; names file and row.
    """
    if file is None:
        own = resources.files("cwac_lab.data.embedded").joinpath(OWN).read_text(encoding="utf-8")
        return [text for kind in yaml.safe_load(own).values() for text in kind]
    path = Path(file)
    if not path.is_file() or not (path.suffix == ".txt" or kind_of(path)):
        accepted = f"a file of {', '.join(('.txt', *SUFFIXES))}, the last four also with {' or '.join(CODECS)}"
        raise MissingAsset(f"evaluation.plain_text={file}: accepted: {accepted}")
    found = _paragraphs(path) if path.suffix == ".txt" else _cells(path)
    for place, text in found:
        if not isinstance(text, str) or len(text.split()) < 2:
            raise LabError(f"{place}: {text!r:.60} is no document; accepted: a text of two words or more")
    return [text for _, text in found]


def _paragraphs(path: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LabError(f"evaluation.plain_text={path}: no text in UTF-8 ({error})") from None
    found: list[tuple[int, list[str]]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if not found or not lines[number - 2].strip():
            found.append((number, []))
        found[-1][1].append(line)
    if not found:
        raise LabError(f"evaluation.plain_text={path}: the file is empty")
    return [(f"{path}, line {number}", "\n".join(held)) for number, held in found]


def _cells(path: Path) -> list[tuple[str, Any]]:
    rows = read_rows(path)
    for row in rows:
        if COLUMN not in row.cells:
            raise LabError(f"{row.at}: no column {COLUMN}; there are {', '.join(row.cells)}")
    return [(row.at, row.cells[COLUMN]) for row in rows]


def content(texts: Sequence[str]) -> str:
    """Return the hash of documents, which a record names."""
    return digest(list(texts))
