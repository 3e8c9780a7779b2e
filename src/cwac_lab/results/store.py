"""Run folders: named and keyed by the resolved configuration (seed included), with a status, one process at a time."""

from __future__ import annotations

import copy
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

from cwac_lab.core.cache import digest, read_json, read_jsonl, write_json, write_jsonl
from cwac_lab.core.errors import LabError

STATUS, METRICS, GENERATIONS, VERDICTS = "status.json", "metrics.json", "generations.jsonl", "verdicts.jsonl"
CONFIG, PROVENANCE, MANIFEST = "config.json", "provenance.json", "manifest.json"
DRIFT, SAMPLES = "drift.json", "drift_samples.json"
CHECKPOINT, MODEL, LOCK = "checkpoint", "model", ".lock"
HEARTBEAT_SECONDS = 30.0
# Raised when the fields of METRICS or PROVENANCE change their meaning.
SCHEMA = 2
# Settings that came after the first records, with what those ran under; at that value they are no part of the key.
LATER: dict[str, Any] = {
    "tuning": {"method": "full"},
    "evaluation.engine": "hf",
    "data.near": "exact",
    "attack": {
        **{"name": "mixed", "rows": "harmful", "ratio": None, "candidates": 4, "prefix": "", "prefill": ""},
        "template": None,
    },
    "constraint.weight.gradient_share": 1.0,
    "forms": {"name": "own", "others": {}},
}
# The same for what a configuration points to.
ATTACK_ROWS = "attack_rows_sha256"
LATER_CONTENT = {ATTACK_ROWS: "dd60242a8a1bf6e76d2875b5749ab3d721a1d0a1dcbbf3621eb0165e9044d535"}
# Records of before judges had versions were all made by this one of the refusal judge.
UNVERSIONED: dict[str, Any] = {"refusal": {"version": "3be1e32bf591cd0e"}}
# What ran, told in METRICS of a finished run and, from its beginning, in PROVENANCE.
FACTS = ("weights", "weights_content", "model", "task", "data", "constraint", "harmful_ratio", "seed", "split")


def judges_of(metrics: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what METRICS tell of the judges by name, the one whose verdicts the rates are first."""
    return metrics.get("judges") or UNVERSIONED


def judged_by(metrics: dict[str, Any]) -> str:
    """Return whose verdicts the rates of METRICS are, by name and version."""
    name, told = next(iter(judges_of(metrics).items()))
    return f"{name} {told['version'][:8]}"


def verdicts_of(judge: str) -> str:
    """Return the file of the verdicts of a judge other than the first."""
    return f"verdicts-{judge}.jsonl"


def run_key(resolved: dict[str, Any], incidental: Iterable[str], content: dict[str, str]) -> str:
    """Return the identity of a run.

    Args:
        resolved: The resolved configuration.
        incidental: Settings that change no result, as dotted paths; they are left out.
        content: Hashes of what the configuration points to: weights and data.
    """
    content = {name: value for name, value in content.items() if LATER_CONTENT.get(name) != value}
    kept = copy.deepcopy(resolved)
    for path in incidental:
        _drop(kept, path)
    if "devices" in kept.get("trainer", {}):
        kept["trainer"]["devices"] = 1  # is in the keys of records from before there could be more
    if kept.get("tuning", {}).get("base") == "float32":
        del kept["tuning"]["base"]  # is not in the keys of records from before there were others
    for path, value in LATER.items():
        if _get(kept, path) == value:
            _drop(kept, path)
    return digest([_numbers_alike(kept), content])


def _parent(node: dict[str, Any], path: str) -> tuple[dict[str, Any], str]:
    """Return the mapping that holds a dotted path, an empty one where there is none, and the last name of the path."""
    *parts, last = path.split(".")
    for part in parts:
        node = node.get(part, {})
    return node, last


def _get(node: dict[str, Any], path: str) -> Any:
    parent, name = _parent(node, path)
    return parent.get(name)


def _drop(node: dict[str, Any], path: str) -> None:
    parent, name = _parent(node, path)
    parent.pop(name, None)


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Return a nested mapping as one of dotted keys."""
    if not isinstance(node, dict):
        return {prefix: node}
    return {k: v for key, child in node.items() for k, v in flat(child, f"{prefix}.{key}".lstrip(".")).items()}


def _numbers_alike(value: Any) -> Any:
    """Return a JSON-able value in which 1 and 1.0 are one number."""
    if isinstance(value, dict):
        return {key: _numbers_alike(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_numbers_alike(child) for child in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


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
        if not isinstance(told, dict) or "status" not in told:
            raise LabError(f"{self.path / STATUS} names no status; remove the folder to run it again")
        return told

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
        """Return the resolved configuration; a setting that came later has the value that the run had without it."""
        found: dict[str, Any] = self.read(CONFIG)
        for path, value in LATER.items():
            parent, name = _parent(found, path)
            parent.setdefault(name, value)
        return found

    def facts(self) -> dict[str, Any]:
        """Return what ran, or is to run, by the names of ``FACTS``; with the metrics where the run is finished.

        Raises:
            LabError: If the record is not there, cannot be read, or was written under another schema.
        """
        name = METRICS if self.told()["status"] == "ok" else PROVENANCE
        try:
            found = self.read(name)
        except (OSError, ValueError) as error:
            raise LabError(f"{self.path / name} cannot be read ({error})") from None
        schema = found.get("schema", 1) if isinstance(found, dict) else None
        if schema != SCHEMA:
            raise LabError(f"{self.path / name} has schema {schema}, accepted: {SCHEMA} (run it again)")
        return dict(found) if name == METRICS else {fact: found[fact] for fact in FACTS}

    def remove(self, name: str) -> None:
        """Remove a folder of the run, where it is there."""
        if self.writes:
            shutil.rmtree(self.path / name, ignore_errors=True)

    def discard(self, pattern: str, keep: Iterable[str]) -> None:
        """Remove files of the run that match a pattern, but those to keep."""
        for file in self.path.glob(pattern) if self.writes else ():
            if file.name not in keep:
                file.unlink(missing_ok=True)

    def has(self, name: str) -> bool:
        """Tell whether a file or folder of the run is there."""
        return (self.path / name).exists()


def runs(output_root: Path) -> Iterator[RunFolder]:
    """Yield the runs under an output folder, sorted by name."""
    for status in sorted((output_root / "runs").glob(f"*/{STATUS}")):
        yield RunFolder(status.parent)
