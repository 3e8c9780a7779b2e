"""Memory of a process that makes several runs, one after the other."""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress


def give_back() -> None:
    """Give the system back what is no longer used.

    A trainer, its module and its model refer to each other in a circle, and glibc keeps freed pages for later. A run of
    SmolLM2-135M left 3 GB in its process without this; its peak would have counted in the next run's record.
    """
    gc.collect()
    with suppress(OSError, AttributeError, TypeError):  # other systems have no such function
        ctypes.CDLL(None).malloc_trim(0)
