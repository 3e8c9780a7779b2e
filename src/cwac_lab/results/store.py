"""Run folders: named by what ran and a key, with a status, one process at a time; and all runs of a store."""

from __future__ import annotations

import os
import shutil
import socket
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cwac_lab.core.cache import read_json, read_jsonl, write_json, write_jsonl
from cwac_lab.core.errors import ConfigError, LabError
from cwac_lab.results import schema2
from cwac_lab.results.archive import ArchivedRun, archived, holds
from cwac_lab.results.fields import Misfit, check
from cwac_lab.results.later import completed
from cwac_lab.results.record import (
    CONFIG,
    COURSE,
    DRIFT,
    FACTS,
    GENERATIONS,
    MANIFEST,
    METRICS,
    PROVENANCE,
    SAMPLES,
    SCHEMA,
    STATUS,
    VERDICTS,
    Metrics,
    Provenance,
    Record,
    Status,
    flat,
    judged_by,
    valid,
    verdicts_of,
)

__all__ = [
    "CONFIG",
    "COURSE",
    "DRIFT",
    "FACTS",
    "GENERATIONS",
    "MANIFEST",
    "METRICS",
    "PROVENANCE",
    "SAMPLES",
    "SCHEMA",
    "STATUS",
    "VERDICTS",
    "Record",
    "flat",
    "judged_by",
    "verdicts_of",
]
CHECKPOINT, GUARD, MODEL, ADAPTER, LOCK = "checkpoint", "guard", "model", "adapter", ".lock"
HEARTBEAT_SECONDS = 30.0


@dataclass(frozen=True)
class RunFolder:
    """One run on disk; of a run in several processes the first one writes."""

    path: Path
    writes: bool = True

    @property
    def status(self) -> str:
        """Return ``ok``, ``failed``, ``running``, ``interrupted`` (its process is gone), or ``new``.

        Raises:
            LabError: If the file that says so cannot be read.
        """
        if not (self.path / STATUS).is_file():
            return "new"
        told = self.told()
        if told["status"] != "running":
            return str(told["status"])
        try:
            with self.claim() as free:
                return "interrupted" if free else "running"
        except OSError:  # of a store that can only be read nobody can tell
            return "running"

    def told(self) -> dict[str, Any]:
        """Return what the status file says: status, reason of a failure, host, process and heartbeat.

        Raises:
            LabError: If it cannot be read.
        """
        try:
            told = self.read(STATUS)
        except ValueError as error:
            raise LabError(f"{self.path / STATUS} is no JSON ({error}); remove the folder to run it again") from None
        try:
            check(Status, told)
        except Misfit as error:
            raise LabError(f"{self.path / STATUS}: {error}; remove the folder to run it again") from None
        return dict(told)

    def done(self) -> bool:
        """Tell whether the run is finished."""
        return self.has(STATUS) and self.told()["status"] == "ok"

    def mark(self, status: str, reason: str | None = None) -> None:
        """Write the status, with a reason where it failed, and who wrote it when."""
        if not self.writes:
            return
        written = {"status": status} | ({"reason": reason} if reason else {})
        now = datetime.now(UTC).isoformat(timespec="seconds")
        write_json(self.path / STATUS, written | {"host": socket.gethostname(), "pid": os.getpid(), "heartbeat": now})

    @contextmanager
    def claim(self, wait: float = 0.0) -> Iterator[bool]:
        """Hold the run for this process while the block runs; yields False where another holds it for ``wait`` seconds.

        The lock is the operating system's, so that of a killed process is free at once.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / LOCK)
        try:
            lock.acquire(timeout=wait)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Mark the run as running, with a heartbeat, while the block runs; its end is marked ``ok`` or ``failed``."""
        over = threading.Event()
        self.mark("running")

        def beat() -> None:
            while not over.wait(HEARTBEAT_SECONDS):
                with suppress(OSError):  # a disk that is full by now is told of by what is written next
                    self.mark("running")

        pulse = threading.Thread(target=beat, daemon=True)
        pulse.start()
        end: tuple[str, str | None] = ("ok", None)
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            end = ("interrupted", None)
            raise
        except BaseException as error:
            end = ("failed", " ".join(f"{type(error).__name__}: {error}".split()))
            raise
        finally:
            over.set()
            pulse.join()
            with suppress(OSError) if end[0] != "ok" else nullcontext():  # what is raised already says more
                self.mark(*end)

    def write(self, name: str, value: Any) -> None:
        """Write a JSON file, or JSON Lines where the name says so; atomic."""
        if not self.writes:
            return
        write = write_jsonl if name.endswith(".jsonl") else write_json
        write(self.path / name, value)

    def read(self, name: str) -> Any:
        """Read a file that ``write`` wrote."""
        return read_jsonl(self.path / name) if name.endswith(".jsonl") else read_json(self.path / name)

    def config(self) -> dict[str, Any]:
        """Return the resolved configuration, with what it did where settings came later.

        Raises:
            LabError: If the record is not there, cannot be read, or is of another schema.
        """
        told, provenance = self._whole(CONFIG), self._whole(PROVENANCE) if self.has(PROVENANCE) else {}
        return completed(schema2.configuration(told) if provenance.get("schema") == schema2.SCHEMA else told)

    def facts(self) -> dict[str, Any]:
        """Return what ran, or is to run, by the names of ``FACTS``; with the metrics where the run is finished.

        Raises:
            LabError: If the record is not there, cannot be read, or is of another schema.
        """
        if self.told()["status"] == "ok":
            return self._valid(Metrics, METRICS)
        return {fact: value for fact, value in self.provenance().items() if fact in FACTS}

    def provenance(self) -> dict[str, Any]:
        """Return what made the record; raises as ``facts``."""
        return self._valid(Provenance, PROVENANCE)

    def _whole(self, name: str) -> dict[str, Any]:
        try:
            found: dict[str, Any] = self.read(name)
        except (OSError, ValueError) as error:
            raise LabError(f"{self.path / name} cannot be read ({error})") from None
        return found

    def _valid(self, kind: type, name: str) -> dict[str, Any]:
        return valid(kind, self._whole(name), self.path / name)

    def verdict_files(self) -> list[str]:
        """Return the files of verdicts: the first judge's, then the others' by name."""
        first = [VERDICTS] if self.has(VERDICTS) else []
        return [*first, *sorted(path.name for path in self.path.glob(verdicts_of("*")))]

    def files(self) -> list[Path]:
        """Return the files that a table of this run is made of."""
        names = (STATUS, CONFIG, METRICS, PROVENANCE, VERDICTS)
        return [self.path / name for name in names if self.has(name)]

    def remove(self, name: str) -> None:
        """Remove a folder of the run, where it is there; whoever is killed meanwhile leaves no part under its name."""
        if not self.writes:
            return
        gone = self.path / f".{name}.removed"
        shutil.rmtree(gone, ignore_errors=True)
        if (self.path / name).exists():
            (self.path / name).rename(gone)
            shutil.rmtree(gone, ignore_errors=True)

    def discard(self, pattern: str, keep: Iterable[str]) -> None:
        """Remove files of the run that match a pattern, but those to keep."""
        for file in self.path.glob(pattern) if self.writes else ():
            if file.name not in keep:
                file.unlink(missing_ok=True)

    def has(self, name: str) -> bool:
        """Tell whether a file or folder of the run is there."""
        return (self.path / name).exists()


def folders(output_root: Path) -> Iterator[RunFolder]:
    """Yield the run folders of a store, sorted by name."""
    for status in sorted((output_root / "runs").glob(f"*/{STATUS}")):
        yield RunFolder(status.parent)


def runs(output_root: Path) -> Iterator[Record]:
    """Yield the runs of a store sorted by name: its folders, and what its archive holds beside them.

    Of a run that is both a folder and in the archive the folder counts: it is what a process works on.

    Raises:
        LabError: If the archive is damaged, or of a schema that cannot be read.
    """
    found: dict[str, Record] = {run.path.name: run for run in archived(output_root)}
    found |= {run.path.name: run for run in folders(output_root)}
    for name in sorted(found):
        yield found[name]


def named(key: str, path: Path) -> RunFolder | ArchivedRun:
    """Return the run at a path: its folder, or ``ARCHIVE/RUN`` for a run of an archive.

    Args:
        key: Setting that names it, for errors.
        path: The path.

    Raises:
        ConfigError: If there is none.
        LabError: If the archive is damaged, or of a schema that cannot be read.
    """
    if (path / STATUS).is_file():
        return RunFolder(path)
    for run in archived(path.parent) if holds(path.parent) else ():
        if run.path.name == path.name:
            return run
    raise ConfigError(
        key, path, "the folder of a run (outputs/runs/NAME), or a run of an archive (experiments/NAME/RUN)"
    )
