"""Run folders: named and keyed by the resolved configuration (seed included), with a status."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cwac_lab.cache import digest, read_json, read_jsonl, write_json, write_jsonl

STATUS, METRICS, GENERATIONS, VERDICTS = "status.json", "metrics.json", "generations.jsonl", "verdicts.jsonl"
CONFIG, PROVENANCE, MANIFEST = "config.json", "provenance.json", "manifest.json"
CHECKPOINT, MODEL = "checkpoint", "model"


def run_key(resolved: dict[str, Any], incidental: Iterable[str]) -> str:
    """Return the hash of a resolved configuration without settings that change no result (dotted paths)."""
    kept = copy.deepcopy(resolved)
    for path in incidental:
        node, *parts = kept, *path.split(".")
        for part in parts[:-1]:
            node = node.get(part, {})
        node.pop(parts[-1], None)
    return digest(kept)


@dataclass(frozen=True)
class RunFolder:
    """One run on disk."""

    path: Path

    @property
    def status(self) -> str:
        """Return ``ok``, ``failed``, ``running``, or ``new`` where nothing was written."""
        file = self.path / STATUS
        return str(read_json(file)["status"]) if file.is_file() else "new"

    def mark(self, status: str, reason: str | None = None) -> None:
        """Write the status, with a reason where it failed."""
        write_json(self.path / STATUS, {"status": status} | ({"reason": reason} if reason else {}))

    def write(self, name: str, value: Any) -> None:
        """Write a JSON file, or JSON Lines where the name says so; atomic."""
        write = write_jsonl if name.endswith(".jsonl") else write_json
        write(self.path / name, value)

    def read(self, name: str) -> Any:
        """Read a file that ``write`` wrote."""
        return read_jsonl(self.path / name) if name.endswith(".jsonl") else read_json(self.path / name)

    def remove(self, name: str) -> None:
        """Remove a folder of the run, where it is there."""
        shutil.rmtree(self.path / name, ignore_errors=True)

    def has(self, name: str) -> bool:
        """Tell whether a file or folder of the run is there."""
        return (self.path / name).exists()


def runs(output_root: Path) -> Iterator[RunFolder]:
    """Yield the runs under an output folder, sorted by name."""
    for status in sorted((output_root / "runs").glob(f"*/{STATUS}")):
        yield RunFolder(status.parent)
