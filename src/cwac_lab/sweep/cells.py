"""Which run a cell of a grid came to, so that a recorded one is found again without composing it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cwac_lab.config.run import Run
from cwac_lab.core.cache import digest, file_digest, read_json, write_json
from cwac_lab.core.overrides import parsed
from cwac_lab.core.provenance import sources
from cwac_lab.results.store import RunFolder
from cwac_lab.run.asked import answered, asks
from cwac_lab.run.identity import OWN, known, start_key

FILE = "cells.json"
_ENTRY = {"start", "content", "run", "asked"}


# A folder of a user's own options, in an override of Hydra's search path.
_KEY, _FILES = "hydra.searchpath=", "file://"


def _options(folder: str) -> list[list[str]]:
    """Return the options of a folder, with hashes of what they say; groups are folders in it."""
    return [[str(file), file_digest([file])] for file in sorted(Path(folder).rglob("*.yaml")) if file.is_file()]


class Cells:
    """The cells of a store, by their overrides, the configuration these choose from and the code that reads it.

    An entry holds only while what its run starts from, weights and data, has the hashes it had; so the first cell
    of each start is composed, and the others are looked up.
    """

    def __init__(self, output_root: Path) -> None:
        """Read what is known of a store; a file that cannot be read counts as none."""
        self._root, self._file = output_root, output_root / FILE
        self._sources = sources()
        self._entries = self._read()

    def _read(self) -> dict[str, Any]:
        try:
            found = read_json(self._file)
        except (OSError, ValueError):
            return {}
        entries = found.items() if isinstance(found, dict) else ()
        return {key: entry for key, entry in entries if isinstance(entry, dict) and entry.keys() == _ENTRY}

    def _key(self, overrides: Sequence[str]) -> str:
        searched = [override for override in overrides if override.startswith(_KEY)]
        folders = [str(folder) for override in parsed(searched) for folder in override.value()]
        own = [_options(folder.removeprefix(_FILES)) for folder in folders if folder.startswith(_FILES)]
        return digest([self._sources, list(overrides), own])

    def finished(self, overrides: Sequence[str]) -> Path | None:
        """Return the folder of a cell that is known and finished."""
        entry = self._entries.get(self._key(overrides))
        if entry is None or known(entry["start"]) != entry["content"]:
            return None
        folder = RunFolder(self._root / "runs" / str(entry["run"]))
        there = folder.status == "ok" and answered(entry["asked"], folder)  # it may have been made anew, and asked less
        return folder.path if there else None

    def add(self, overrides: Sequence[str], run: Run, content: dict[str, str], path: Path) -> None:
        """Remember a cell, unless it is to be repeated whatever is recorded, or sources were edited meanwhile.

        One with a user's own class is not remembered: its source may change and is no part of ``sources``.
        """
        if not run.force and OWN not in content and sources() == self._sources:
            self._entries[self._key(overrides)] = {
                "start": start_key(run), "content": content, "run": path.name, "asked": asks(run.resolved),
            }  # fmt: skip

    def save(self) -> None:
        """Write what is known, with what other processes wrote meanwhile."""
        write_json(self._file, self._read() | self._entries)
