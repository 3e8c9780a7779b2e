"""Rows of files: JSON Lines, a JSON list, CSV and Parquet, each row with the place where it stands.

Nothing is guessed: a file that cannot be read whole is one line with file and line. A cell is kept as the file has it:
text in CSV (an empty cell is ""), typed in the others (null is None). A file may be compressed (``.gz``, ``.zst``).
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cwac_lab.core.errors import LabError, MissingAsset

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
# Endings of compressed files, by the codec of pyarrow that reads them.
CODECS = {".gz": "gzip", ".zst": "zstd"}
# MiB of the longest line of JSON or CSV unless told otherwise: what is longer is most often no file of rows.
LONGEST = 16
_DELIMITERS = (",", ";", "\t")
# The mark of UTF-32 begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_BREAK = re.compile(r"\r\n|\r|\n")  # as editors count lines; U+2028 and its like are characters of a text
_SPACE = re.compile(r"[ \t\r\n]*")
_WANTED = "one JSON object a line, or one list of objects, is wanted"


@dataclass(frozen=True)
class Row:
    """One row: its cells by column, and where it stands (file, and line or row counted from 1)."""

    cells: dict[str, Any]
    at: str


def find_file(root: Path, stem: str) -> Path:
    """Return the file ``root/stem``, which may be named with or without its suffix.

    Raises:
        MissingAsset: If there is none.
        LabError: If several differ by their suffix only.
    """
    with _readable(root / stem):
        return _find(root, stem)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MissingAsset(f"{path} cannot be read ({error.strerror})") from None


def _find(root: Path, stem: str) -> Path:
    named = root / stem
    if kind_of(named) and named.is_file():
        return named
    found = [path for suffix in SUFFIXES if (path := root / f"{stem}{suffix}").is_file()]
    if len(found) > 1:
        files = " and ".join(path.name for path in found)
        raise LabError(f"{named}: there are {files}; keep one, or name the one to read with its suffix")
    if found:
        return found[0]
    beside = named.parent.iterdir() if named.parent.is_dir() else ()
    seen = sorted(f"{path.name}{' (a folder)' * path.is_dir()}" for path in beside if path.name.startswith(named.name))
    there = f"; there is {', '.join(seen)}" if seen else ""
    raise MissingAsset(f"data.root={root}: no {stem} with one of the suffixes {', '.join(SUFFIXES)}{there}")


def kind_of(path: Path) -> str:
    """Return the suffix of a file of rows, without that of its compression; "" where it is none."""
    suffix = Path(path.stem).suffix if path.suffix in CODECS else path.suffix
    return suffix if suffix in SUFFIXES else ""


def shards(path: Path) -> list[Path]:
    """Return a file, or the files of rows in a folder, in the order of their names.

    Raises:
        MissingAsset: If there is none.
    """
    if not path.is_dir():
        if path.is_file() and kind_of(path):
            return [path]
        there = "a file with none of the suffixes" if path.is_file() else "no such file or folder; accepted:"
        raise MissingAsset(f"{path}: {there} {', '.join(SUFFIXES)}, also with {' or '.join(CODECS)}")
    found = sorted(file for file in path.iterdir() if file.is_file() and kind_of(file))
    if not found:
        raise MissingAsset(f"{path}: a folder without a file of {', '.join(SUFFIXES)}, also with {' or '.join(CODECS)}")
    return found


def read_rows(path: Path, bad: list[str] | None = None, longest: int = LONGEST) -> list[Row]:
    """Read a file by its suffix.

    Args:
        path: The file.
        bad: Takes what is wrong with single lines, which are then left out; None: the first one is an error.
        longest: Longest line, in MiB (``data.max_line``).

    Raises:
        LabError: If it cannot be read, is not what its suffix says, or has no rows; names file and line.
    """
    with _readable(path):
        content = _unpacked(path, path.read_bytes())
    if content.startswith(b"version https://git-lfs"):
        raise MissingAsset(f"{path} is a pointer of Git LFS and not the data; git lfs pull fetches it")
    kind = kind_of(path) or path.suffix
    if kind == ".parquet":
        rows = _parquet(path, content)
    else:
        _check_lines(path, content, longest)
        rows = list((_csv if kind == ".csv" else _json)(path, _decoded(path, content), bad))
    if not rows and not bad:
        raise LabError(f"{path} has no rows")
    return rows


def _unpacked(path: Path, content: bytes) -> bytes:
    if path.suffix not in CODECS:
        return content
    import pyarrow

    try:
        with pyarrow.CompressedInputStream(pyarrow.BufferReader(content), CODECS[path.suffix]) as stream:
            return bytes(stream.read())
    except (pyarrow.ArrowException, OSError) as error:
        raise LabError(f"{path} is not compressed as {path.suffix} says, or is cut off ({error})") from None


def _check_lines(path: Path, content: bytes, longest: int) -> None:
    """Check that no line is longer than a limit, but for a JSON list, which may stand on one."""
    begin = content[:64].lstrip(b"\xef\xbb\xbf\xfe\xff").replace(b"\0", b"")  # whatever the encoding
    if len(content) <= longest << 20 or begin.lstrip().startswith(b"["):
        return
    for number, line in enumerate(content.split(b"\n"), 1):
        if len(line) > longest << 20:
            most = f"accepted: at most data.max_line={longest} MiB a line"
            raise LabError(f"{path}, line {number}: {len(line) / 2**20:.0f} MiB; {most}")


@contextmanager
def _told(bad: list[str] | None) -> Iterator[None]:
    """Put an error about one line on a list, where there is one."""
    try:
        yield
    except LabError as error:
        if bad is None:
            raise
        bad.append(str(error))


def _line(text: str) -> int:
    """Return the number of the line on which a text ends."""
    return sum(1 for _ in _BREAK.finditer(text)) + 1


def _decoded(path: Path, content: bytes) -> str:
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = _line(content[: error.start].decode(encoding, "ignore"))
        name = encoding.removesuffix("-sig").upper()
        wrong = f"byte 0x{content[error.start]:02x} is not {name}; save the file as UTF-8"
        raise LabError(f"{path}, line {line}: {wrong}") from None
    if "\0" in text:
        raise LabError(f"{path}, line {_line(text[: text.index(chr(0))])}: a NUL byte; save the file as UTF-8 text")
    if not text.strip():
        raise LabError(f"{path} is empty")
    return text


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON, in which every key may stand once."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} stands twice in an object")
        found[key] = value
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_once)


def _object(path: Path, line: int, text: str, at: int) -> tuple[Row, int]:
    """Return the row that begins at a place of a text, and where it ends."""
    try:
        cells, end = _DECODER.raw_decode(text, at)
    except json.JSONDecodeError as error:
        line += _line(text[at : error.pos]) - 1
        raise LabError(f"{path}, line {line}: no JSON or cut off ({error.msg}); {_WANTED}") from None
    except (ValueError, RecursionError) as error:
        raise LabError(f"{path}, line {line}: {error}") from None
    if not isinstance(cells, dict):
        raise LabError(f"{path}, line {line}: {json.dumps(cells)[:60]} is no JSON object; {_WANTED}")
    return Row(cells, f"{path}, line {line}"), end


def _json(path: Path, text: str, bad: list[str] | None) -> Iterator[Row]:
    if text.lstrip().startswith("["):
        yield from _json_list(path, text)
        return
    for number, line in enumerate(_BREAK.split(text), 1):
        row = None
        if line.strip():
            with _told(bad):
                row = _json_line(path, number, line)
        if row is not None:
            yield row


def _json_line(path: Path, number: int, line: str) -> Row:
    row, end = _object(path, number, line, _after_space(line, 0))
    if rest := line[end:].strip():
        raise LabError(f"{path}, line {number}: {rest[:40]!r} stands after the object; {_WANTED}")
    return row


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _json_list(path: Path, text: str) -> Iterator[Row]:
    begin = text.index("[") + 1
    line, at, counted = 1, _after_space(text, begin), 0
    closed = text[at : at + 1] == "]"
    while not closed:
        line, counted = line + _line(text[counted:at]) - 1, at
        row, end = _object(path, line, text, at)
        yield row
        at = _after_space(text, end)
        closed = text[at : at + 1] == "]"
        if not closed:
            if text[at : at + 1] != ",":
                raise LabError(f"{path}, line {_line(text[:at])}: the list is cut off or lacks a comma; {_WANTED}")
            at = _after_space(text, at + 1)
    if rest := text[at + 1 :].strip():
        raise LabError(f"{path}, line {_line(text[: at + 1])}: {rest[:40]!r} stands after the list; {_WANTED}")


def _records(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the fields of each record of a CSV file, with the line it begins on; blank lines are left out."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True)
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            wrong = f"no CSV, or a quote that is not closed ({error}); a quote within quotes is doubled"
            raise LabError(f"{path}, line {line}: {wrong}") from None
        if fields is None:
            return
        if fields:
            yield line, fields


def _header(path: Path, text: str) -> tuple[str, list[str]]:
    """Return the delimiter, the first of the known ones that parts the header, and the names of the columns."""
    for delimiter in _DELIMITERS:
        try:
            line, fields = next(_records(path, text, delimiter))
        except LabError:
            continue
        if len(fields) > 1:
            break
    else:
        delimiter = ","
        line, fields = next(_records(path, text, delimiter))
    names = [field.strip() for field in fields]
    for number, name in enumerate(names):
        # The first has none where pandas wrote its index.
        if (number and not name) or name in names[:number]:
            wrong = f"column {number + 1} of the header " + (f"is {name!r} again" if name else "has no name")
            raise LabError(f"{path}, line {line}: {wrong}; every column needs a name of its own")
    return delimiter, names


def _csv(path: Path, text: str, bad: list[str] | None) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    delimiter, names = _header(path, text)
    records = _records(path, text, delimiter)
    next(records)
    for line, fields in records:
        if len(fields) == 1 < len(names) and not fields[0].strip():
            continue  # a line of spaces
        if len(fields) == len(names):
            yield Row(dict(zip(names, fields, strict=True)), f"{path}, line {line}")
            continue
        with _told(bad):
            wrong = f"{len(fields)} fields, and the header has {len(names)}"
            raise LabError(f"{path}, line {line}: {wrong}; a text with {delimiter!r} in it is put in quotes")


def _parquet(path: Path, content: bytes) -> list[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(pyarrow.BufferReader(content)).read()
        found = table.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise LabError(f"{path} is no Parquet file that can be read ({error})") from None
    if twice := sorted({name for name in table.column_names if table.column_names.count(name) > 1}):
        raise LabError(f"{path}: {', '.join(twice)} is the name of two columns; every column needs a name of its own")
    return [Row(cells, f"{path}, row {number}") for number, cells in enumerate(found, 1)]
