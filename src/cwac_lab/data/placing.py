"""Rows read by their cells: whatever a cell does not allow is told with the place of its row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cwac_lab.core.errors import ConfigError, LabError
from cwac_lab.data.cells import text
from cwac_lab.data.reading import Row, read_rows


@contextmanager
def placed(row: Row, key: str, value: object) -> Iterator[None]:
    """Name the place of a row, and the setting that it is read by, in errors of whoever reads its cells."""
    try:
        yield
    except KeyError as error:
        raise ConfigError(key, value, f"rows with a column {error}; {row.at} has {', '.join(row.cells)}") from error
    except ValueError as error:
        raise LabError(f"{row.at}: {error} ({key}={value})") from error
    except (IndexError, TypeError, AttributeError) as error:
        raise LabError(f"{row.at}: {type(error).__name__}: {error} ({key}={value})") from error


def read_texts(path: Path, *columns: str) -> list[tuple[str, ...]]:
    """Return the texts of some columns of a file, row by row.

    Raises:
        LabError: If it cannot be read, lacks a column, or a cell is empty or no text; names file and line.
    """
    found = []
    for row in read_rows(path):
        with placed(row, "columns", ", ".join(columns)):
            found.append(tuple(text(row.cells, column) for column in columns))
    return found
