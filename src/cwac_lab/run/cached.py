"""Artefacts that all processes of a run make together, kept by their key."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cwac_lab.core import distributed
from cwac_lab.core.cache import cached_folder


def together(root: Path, kind: str, key: dict[str, Any], build: Callable[[Path], None]) -> Path:
    """Return ``cached_folder``, where all processes of the run build if the first one finds that it must.

    The others do their part of the work and keep nothing of it.
    """
    if distributed.rank():
        if distributed.told(False):
            with TemporaryDirectory() as scratch:
                build(Path(scratch))
        return distributed.told(Path())
    announced = False

    def led(folder: Path) -> None:
        nonlocal announced
        announced = distributed.told(True)
        build(folder)

    found = cached_folder(root, kind, key, led)
    if not announced:
        distributed.told(False)
    return distributed.told(found)
