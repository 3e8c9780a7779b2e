"""Content-keyed folders, written atomically: a folder that exists is complete and was made from what its key says."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from filelock import FileLock

KEY_FILE = "key.json"


def digest(value: object) -> str:
    """Return the SHA-256 (hex) of a JSON-able value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def file_digest(paths: Iterable[Path]) -> str:
    """Return the SHA-256 (hex) over the contents of files, in the order given.

    A file that this process has read, and whose size and time of change are the same, is not read again.
    """
    total = hashlib.sha256()
    for path in paths:
        found = path.stat()
        total.update(_content(path, found.st_size, found.st_mtime_ns, found.st_ino))
    return total.hexdigest()


@lru_cache(maxsize=1024)
def _content(path: Path, *_: int) -> bytes:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically (temporary file in the same folder, then rename)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: object) -> None:
    """Write a JSON file atomically, indented, with the order of keys kept.

    Raises:
        ValueError: If a number is not finite, which no JSON can tell; what is not known is None.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write JSON Lines atomically."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read JSON Lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def cached_folder(root: Path, kind: str, key: dict[str, Any], build: Callable[[Path], None]) -> Path:
    """Return ``root/kind/<hash of key>``, built first by ``build(folder)`` where it is absent.

    The folder is filled under a temporary name and renamed when complete, so a killed build leaves nothing that a
    later run could mistake for a result. Of processes that need it at once one builds and the others wait.
    """
    target = root / kind / digest(key)[:16]
    if (target / KEY_FILE).is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{target.name}.lock")):
        if (target / KEY_FILE).is_file():
            return target
        scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=".building-"))
        try:
            build(scratch)
            write_json(scratch / KEY_FILE, key)
            scratch.chmod(0o755)
            scratch.rename(target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return target
