"""Content-keyed folders, written atomically: a folder that exists is complete and was made from what its key says."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from cwac_lab.core.errors import ConfigError, LabError, MissingAsset

KEY_FILE = "key.json"
# A folder is filled under this name and its own, which has so many letters.
_SCRATCH, _NAME = ".building-", 16


def digest(value: object) -> str:
    """Return the SHA-256 (hex) of a JSON-able value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def shortened(content: str, length: int = 8) -> str:
    """Return the first digits of a hash; a model of the hub, ``ORG/NAME@commit``, is named whole."""
    return content[:length] if re.fullmatch("[0-9a-f]+", content) else content


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
    """Read what ``write_jsonl`` wrote.

    Raises:
        LabError: If a line is no JSON; names file and line.
    """
    rows = []
    # At line feeds only: U+2028, U+2029, U+0085 and others that ``splitlines`` knows are characters of a text.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        try:
            rows += [json.loads(line)] if line else []
        except ValueError as error:
            raise LabError(f"{path}, line {number}: no JSON ({error})") from None
    return rows


def cached_folder(root: Path, kind: str, key: dict[str, Any], build: Callable[[Path], None]) -> Path:
    """Return ``root/kind/<hash of key>``, built first by ``build(folder)`` where it is absent.

    The folder is filled under a temporary name and renamed when complete, so a killed build leaves nothing that a
    later run could mistake for a result. Of processes that need it at once one builds and the others wait. A folder
    that does not hold this key (a copy that was broken off, say) is put aside as ``<hash>.incomplete``.

    Raises:
        ConfigError: If it has to be built and ``root`` cannot be written.
    """
    target = root / kind / digest(key)[:_NAME]
    if _made_of(target, key):
        return target
    with _building(target, root):
        if _made_of(target, key):
            return target
        _put_aside(target)
        _clear(target)
        scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{_SCRATCH}{target.name}-"))
        try:
            build(scratch)
            write_json(scratch / KEY_FILE, key)
            scratch.chmod(0o755)
            scratch.rename(target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return target


def _lock(target: Path) -> FileLock:
    """Return the lock that who builds a folder holds."""
    return FileLock(target.with_name(f".{target.name}.lock"))


@contextmanager
def _building(target: Path, root: Path) -> Iterator[None]:
    """Hold the lock of a folder while the block runs."""
    lock = _lock(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise ConfigError("cache_root", root, f"a folder that can be written ({error.strerror or error})") from error
    try:
        yield
    finally:
        lock.release()


def _made_of(folder: Path, key: dict[str, Any]) -> bool:
    """Tell whether a folder was completed, of this key."""
    try:
        return digest(read_json(folder / KEY_FILE)) == digest(key)
    except (OSError, ValueError):
        return False


def _put_aside(folder: Path) -> None:
    """Move away what stands where a folder is to be built, in the place of what was moved away before."""
    if folder.exists() or folder.is_symlink():
        aside = folder.with_name(f"{folder.name}.incomplete")
        if aside.is_dir() and not aside.is_symlink():
            shutil.rmtree(aside)
        aside.unlink(missing_ok=True)
        folder.rename(aside)


def _clear(target: Path) -> None:
    """Remove what killed builds of this kind left; who calls holds the lock of ``target``."""
    for left in target.parent.glob(f"{_SCRATCH}*-*"):
        built = left.with_name(left.name.removeprefix(_SCRATCH)[:_NAME])
        if built == target:
            shutil.rmtree(left, ignore_errors=True)
            continue
        with suppress(Timeout), _lock(built).acquire(timeout=0):  # who builds holds it
            shutil.rmtree(left, ignore_errors=True)


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Say in one line that a file of a folder that this program made is damaged, and how to mend it.

    Raises:
        LabError: If the block finds a file missing or unreadable.
    """
    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError, MissingAsset) as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise LabError(
            f"{folder}: a file in it is missing or damaged ({said}); remove this folder to have it made anew"
        ) from error
