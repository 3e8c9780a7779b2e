"""Folders that are written to: looked at before anything is computed, and what a system says of them in one line."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from cwac_lab.core.errors import ConfigError, LabError

# A full disk, a full quota.
FULL = (errno.ENOSPC, errno.EDQUOT)
# What is not writable, and what cannot be a folder or a file there; a file that is only missing may be a slip of ours.
_UNUSABLE = (
    *(errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
    *(errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENODEV, errno.EFBIG, errno.EMFILE, errno.ENFILE),
)
_ROOTS = ("output_root", "cache_root")


def _reason(error: OSError, place: Path) -> str:
    """Return what is wrong and where; a system calls all that is in a folder's place a file that exists."""
    path = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else place
    if error.errno == errno.EEXIST:
        return f"{'a link that leads nowhere' if path.is_symlink() else 'a file'} is in its place: {path}"
    return f"{error.strerror}: {path}"


def writable(key: str, root: str | Path, inside: str = "") -> None:
    """Check that a folder of the configuration is there or can be made, and that files can be written into it.

    Args:
        key: Setting that names it.
        root: Its value.
        inside: Folder in it that is looked at.

    Raises:
        ConfigError: If not, with what the system says.
        OSError: If the disk is full.
    """
    folder = Path(root, inside)
    try:
        for each in (Path(root), folder):
            each.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".probe-") as probe:
            probe.write(b"0")
            probe.flush()
    except OSError as error:
        if error.errno in FULL:
            raise
        accepted = f"a folder that can be made and written to ({_reason(error, folder)})"
        raise ConfigError(key, root, accepted) from None


def check_cache(root: str, say: Callable[[str], None]) -> None:
    """Check that artefacts can be kept; of a cache that can only be read, what is there can be used.

    Raises:
        ConfigError: If nothing is there either.
    """
    try:
        writable("cache_root", root)
    except ConfigError as error:
        folder = Path(root)
        try:
            held = folder.is_dir() and any(folder.iterdir())
        except OSError:
            held = False
        if not held:
            raise
        say(f"what is in the cache is used, nothing can be added: {error}")


def one_line(error: OSError | SafetensorError, settings: Mapping[Any, Any], keys: str = "") -> LabError | None:
    """Return a system's error as one that a user can act on, or None where it may be a mistake of the program.

    Args:
        error: What a read or a write has raised; safetensors has the system's number in words only.
        settings: The configuration, for the keys that paths come from.
        keys: Those that it comes from where that is not told by ``settings``.
    """
    if isinstance(error, SafetensorError):
        number = next((n for n in (*FULL, *_UNUSABLE) if f"(os error {n})" in str(error)), None)
        return None if number is None else one_line(OSError(number, os.strerror(number)), settings, keys)
    if error.errno in FULL:
        kept = f"what was recorded before in {settings.get('output_root', 'outputs')} is whole"
        return LabError(f"{error.strerror}: free some and run it again; {kept}")
    path = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else None
    in_the_way = error.errno == errno.EEXIST and path is not None and not path.is_dir()
    if error.errno not in _UNUSABLE and not in_the_way:
        return None
    roots = {key: settings.get(key) for key in _ROOTS if isinstance(settings.get(key), str)}
    inside = [f"{key}={root}" for key, root in roots.items() if path is None or path.is_relative_to(str(root))]
    # The cache is inside the output folder unless it is set; the longer name is the nearer one.
    told = (" or ".join(inside) if path is None else max(inside, key=len)) if inside else keys
    reason = error.strerror if path is None else _reason(error, path)
    return LabError(f"{reason}{f' ({told})' if told else ''}: accepted: a place that can be read and written")
