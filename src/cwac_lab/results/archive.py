"""Records of many runs in two files: ``records.parquet``, a row a run, and ``verdicts.parquet``, a row a verdict.

Equal records make equal bytes: rows are sorted, and nothing tells of the writing. Answers are not among them, as texts
of models stay where they were made. Nor are the folders of a machine: of a path in a configuration the last part stays.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from cwac_lab.core.cache import digest
from cwac_lab.core.errors import LabError
from cwac_lab.core.paths import last_part
from cwac_lab.results.later import completed
from cwac_lab.results.record import (
    CONFIG,
    COURSE,
    DRIFT,
    FACTS,
    METRICS,
    PROVENANCE,
    SAMPLES,
    SCHEMA,
    VERDICTS,
    Metrics,
    Provenance,
    Record,
    made_under,
    valid,
)

RECORDS, SAID, LOCK = "records.parquet", "verdicts.parquet", ".archive.lock"
# The files of a run that are a column of RECORDS each, as JSON.
_JSON = {name: name.removesuffix(".json") for name in (CONFIG, METRICS, PROVENANCE, DRIFT, SAMPLES, COURSE)}
_TEXT = pa.string()
_RECORDS = pa.schema(
    [
        *[(name, _TEXT) for name in ("name", "status", "reason", "ended")],
        ("schema", pa.int32()),  # that the run was recorded under; what is told of it is as of today's
        *[(column, _TEXT) for column in _JSON.values()],
        ("verdicts", _TEXT),  # hash of the run's verdicts, so that the two files are known to be of one another
    ],
    metadata={"schema": str(SCHEMA)},
)
# What a verdict may say; ``fields`` names what it does say, in order.
_FIELDS: dict[str, pa.DataType] = {
    **{"kind": _TEXT, "id": _TEXT, "judge": _TEXT, "refused": pa.bool_(), "incoherent": pa.bool_()},
    **{"complied": pa.bool_(), "score": pa.float64(), "reason": _TEXT, "correct": pa.bool_()},
    **{"start_refused": pa.bool_(), "form": _TEXT, "suite": _TEXT, "category": _TEXT, "harmfulness": pa.float64()},
}
# Those that archives of before do not have.
_LATER = ("start_refused", "form", "suite", "category", "harmfulness", "course")
_SAID = pa.schema(
    [("run", _TEXT), ("file", _TEXT), ("fields", _TEXT), *_FIELDS.items()], metadata={"schema": str(SCHEMA)}
)
_Verdicts = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class ArchivedRun:
    """One run of an archive, read as its folder was.

    Attributes:
        path: ``ARCHIVE/NAME``; there is no such folder.
        row: Its row of ``records.parquet``.
    """

    path: Path
    row: dict[str, Any]

    @property
    def status(self) -> str:
        """Return ``ok`` or ``failed``."""
        return str(self.row["status"])

    def told(self) -> dict[str, Any]:
        """Return its ``Status``, without machine and process."""
        told = {"status": self.row["status"], "reason": self.row["reason"], "heartbeat": self.row["ended"]}
        return {name: value for name, value in told.items() if value is not None}

    def facts(self) -> dict[str, Any]:
        """Return its ``Metrics`` where it is finished, else its ``Facts``."""
        if self.status == "ok":
            return valid(Metrics, self.read(METRICS), self.path / METRICS)
        return {fact: value for fact, value in self.provenance().items() if fact in FACTS}

    def provenance(self) -> dict[str, Any]:
        """Return its ``Provenance``."""
        return valid(Provenance, self.read(PROVENANCE), self.path / PROVENANCE)

    def config(self) -> dict[str, Any]:
        """Return its resolved configuration, with what it did where settings came later."""
        return completed(self.read(CONFIG))

    def has(self, name: str) -> bool:
        """Tell whether a file of the record is in the archive."""
        return self.row[_JSON[name]] is not None if name in _JSON else name in self._said()

    def read(self, name: str) -> Any:
        """Return the content of a file of the record.

        Raises:
            LabError: If it is not in the archive.
        """
        if not self.has(name):
            raise LabError(f"{self.path}: no {name} in the archive")
        return json.loads(self.row[_JSON[name]]) if name in _JSON else self._said()[name]

    def verdict_files(self) -> list[str]:
        """Return the files of verdicts: the first judge's, then the others' by name."""
        return sorted(self._said(), key=lambda file: (file != VERDICTS, file))

    def files(self) -> list[Path]:
        """Return the files of the archive."""
        return [self.path.parent / name for name in (RECORDS, SAID)]

    def _said(self) -> _Verdicts:
        root = self.path.parent
        said = _said_by(root / SAID, self.path.name, self.row["verdicts"], *_stamp(root / SAID))
        if said is None:
            raise LabError(f"{root / SAID}: verdicts of {self.path.name} are not those of {root / RECORDS}")
        return said


def holds(root: Path) -> bool:
    """Tell whether a folder holds an archive, or part of one."""
    return any((root / name).is_file() for name in (RECORDS, SAID))


def archived(root: Path) -> list[ArchivedRun]:
    """Return the runs of the archive in a folder, sorted by name; none where there is no archive.

    Raises:
        LabError: If a file is missing, damaged, or of a schema that cannot be read.
    """
    if not holds(root):
        return []
    rows = _rows(root / RECORDS, _RECORDS)
    _rows(root / SAID, _SAID)
    return [ArchivedRun(root / row["name"], row) for row in rows]


def _rows(path: Path, columns: pa.Schema) -> tuple[dict[str, Any], ...]:
    try:
        return _read(path, columns, *_stamp(path))
    except FileNotFoundError:
        raise LabError(f"{path} is missing: an archive is {RECORDS} and {SAID}") from None


def _stamp(path: Path) -> tuple[int, ...]:
    """Return what changes with a file, so that what was read of it is read again."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


@lru_cache(maxsize=32)
def _read(path: Path, columns: pa.Schema, *_: int) -> tuple[dict[str, Any], ...]:
    try:
        table = pq.read_table(path, page_checksum_verification=True, partitioning=None)
        schema = int((table.schema.metadata or {}).get(b"schema", 0))
        for name in set(_LATER) & set(columns.names) - set(table.column_names):
            table = table.append_column(name, pa.nulls(len(table), columns.field(name).type))
        if schema <= SCHEMA:
            return tuple(table.select(columns.names).cast(columns).to_pylist())
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:120]
        raise LabError(f"{path} is damaged or no archive ({reason}); restore it, or archive its runs again") from None
    raise LabError(f"{path} has schema {schema}, accepted: {SCHEMA} (made by a newer version of this program)")


@lru_cache(maxsize=8)
def _by_run(path: Path, *stamp: int) -> dict[str, _Verdicts]:
    """Return the verdicts of an archive by run and file."""
    found: dict[str, _Verdicts] = {}
    for row in _read(path, _SAID, *stamp):
        verdict = {name: row[name] for name in row["fields"].split(",")}
        found.setdefault(row["run"], {}).setdefault(row["file"], []).append(verdict)
    return found


@lru_cache(maxsize=4096)
def _said_by(path: Path, name: str, expected: str, *stamp: int) -> _Verdicts | None:
    """Return the verdicts of a run by file; None where they are not those that are expected, by hash."""
    found = _by_run(path, *stamp).get(name, {})
    return found if digest(found) == expected else None


def add(root: Path, found: Iterable[Record], *, force: bool, say: Callable[[str], None]) -> tuple[int, int]:
    """Add runs to the archive in a folder; returns how many were added, and how many it holds.

    Runs that neither finished nor failed are left out, as are records that cannot be read.

    Args:
        root: The folder; it is made where it is not there.
        found: Runs, as ``store.runs`` yields them.
        force: Whether a run may take the place of another record of its name.
        say: Told of every run that is left out.

    Raises:
        LabError: If a run is in the archive with another record and ``force`` is not set; nothing is written then.
    """
    rows: dict[str, tuple[dict[str, Any], _Verdicts]] = {}
    for run in found:
        try:
            if run.status in ("ok", "failed"):
                rows[run.path.name] = _row(run)
            else:
                say(f"left out: {run.path.name}: {run.status}")
        except (LabError, OSError, ValueError) as error:
            say(f"left out: {run.path.name}: {error}")
    added = len(rows)
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / LOCK):
        # A run that is replaced is not read: its record may be what is to be mended.
        kept = [run for run in archived(root) if not (force and run.path.name in rows)]
        for run in kept:
            held = _row(run)
            if rows.setdefault(run.path.name, held) != held:
                raise LabError(f"{root}: another record of {run.path.name} is in the archive: force=true replaces it")
        # Verdicts first: a record that is there without its verdicts would be one that cannot be read.
        _write(root / SAID, _SAID, [row for name in sorted(rows) for row in _of_verdicts(name, rows[name][1])])
        _write(root / RECORDS, _RECORDS, [rows[name][0] for name in sorted(rows)])
    return added, len(rows)


def _row(run: Record) -> tuple[dict[str, Any], _Verdicts]:
    """Return what the two files hold of a run, as of a record of ``SCHEMA``; checked, as it is read."""
    told = run.told()
    started = run.has(PROVENANCE)
    content: dict[str, Any] = {name: run.read(name) for name in (DRIFT, SAMPLES, COURSE) if run.has(name)}
    content |= {CONFIG: _without_folders(run.config())} if run.has(CONFIG) else {}
    content |= {PROVENANCE: run.provenance()} if started else {}
    content |= {METRICS: run.facts()} if told["status"] == "ok" else {}
    said = {file: run.read(file) for file in run.verdict_files()} if told["status"] == "ok" else {}
    for file, verdicts in said.items():
        if unknown := sorted({name for verdict in verdicts for name in verdict} - _FIELDS.keys()):
            raise LabError(f"{run.path / file}: {unknown[0]}: accepted: {', '.join(_FIELDS)}")
    row = {"name": run.path.name, "status": told["status"], "reason": told.get("reason")}
    row |= {"ended": told.get("heartbeat"), "schema": made_under(content[PROVENANCE]) if started else None}
    row |= {column: _json(content[name]) if name in content else None for name, column in _JSON.items()}
    return row | {"verdicts": digest(said)}, said


# Settings that may hold a path, by their last part; a prefix of an attack may begin with a slash as well.
_PATHS = {
    *("output_root", "cache_root", "root", "path", "adapter", "base", "train", "test", "name"),
    *("plain_text", "export", "lm_eval_tasks", "rubric"),
}


def _without_folders(node: Any, key: str = "") -> Any:
    """Return settings in which an absolute path is its last part."""
    if isinstance(node, dict):
        return {name: _without_folders(child, name) for name, child in node.items()}
    return last_part(node) if isinstance(node, str) and key in _PATHS else node


def _of_verdicts(name: str, said: _Verdicts) -> list[dict[str, Any]]:
    return [
        {**dict.fromkeys(_FIELDS), **verdict, "run": name, "file": file, "fields": ",".join(verdict)}
        for file in sorted(said)
        for verdict in said[file]
    ]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _write(path: Path, columns: pa.Schema, rows: Sequence[dict[str, Any]]) -> None:
    """Write a file atomically; equal rows make equal bytes. Of ``_LATER`` a column that no row has is left out.

    Raises:
        LabError: If a value is not of its column's type.
    """
    later = {name for name in _LATER if not any(row.get(name) is not None for row in rows)}
    try:
        table = pa.Table.from_pylist(list(rows), schema=columns).drop_columns(sorted(later & set(columns.names)))
    except (pa.ArrowException, TypeError) as error:
        raise LabError(f"{path}: {' '.join(str(error).split())[:120]}") from None
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        pq.write_table(
            table, scratch, row_group_size=max(1, len(rows)), compression="zstd", compression_level=19,
            write_page_checksum=True, data_page_size=2**23, dictionary_pagesize_limit=2**23,
        )  # fmt: skip
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
