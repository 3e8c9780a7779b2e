"""Which of several GPUs a run takes: one that no other run of this user is on."""

from __future__ import annotations

import getpass
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import torch
from filelock import FileLock, Timeout

_turns = count()


@contextmanager
def one_of_several(device: torch.device) -> Iterator[None]:
    """Make the current GPU one that is free, while the block runs; where all are taken, they are shared in turn.

    So the local processes of a launcher (joblib, ray) or of several shells spread over a machine's GPUs by themselves.
    """
    there = torch.cuda.device_count() if device.type == "cuda" else 0
    if there < 2:
        yield
        return
    folder = Path(tempfile.gettempdir()) / f"cwac-lab-{getpass.getuser()}"
    folder.mkdir(exist_ok=True)
    for index in range(there):
        lock = FileLock(folder / f"{torch.cuda.get_device_properties(index).uuid}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        try:
            torch.cuda.set_device(index)
            yield
        finally:
            lock.release()
        return
    torch.cuda.set_device(next(_turns) % there)
    yield
