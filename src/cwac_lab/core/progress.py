"""How far a stage is: on a terminal a bar with the time left, in a log a line every ten seconds.

Entry points switch it on (``show``); in a program that only imports the package nothing is printed.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO, TypeVar

T = TypeVar("T")
# Seconds between two lines of a log; a stage that ends before AFTER seconds shows nothing.
EVERY, AFTER = 10.0, 2.0
_on = False


def show(on: bool = True) -> None:
    """Switch progress on or off for this process."""
    global _on
    _on = on


def duration(seconds: float) -> str:
    """Return a time as people say it: ``40 s``, ``3 min``, ``1 h 5 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


class Meter:
    """Tells how far one stage is.

    Args:
        words: What is done.
        total: Steps of it; None where they are not known.
        done: Steps that were done before.
    """

    def __init__(self, words: str, total: int | None, done: float = 0) -> None:
        """Begin at ``done``; nothing is told before the block begins."""
        self.words, self.total, self.done, self._first = words, total, done, done
        self.note = ""
        # That of now: a library may be silenced while the stage goes on.
        self._stream: TextIO = sys.stdout
        self._begin = self._told = time.monotonic()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def line(self) -> str:
        """Return what there is to say now."""
        elapsed = time.monotonic() - self._begin
        new = self.done - self._first
        if self.total is None:
            return f"{self.words}: {duration(elapsed)} so far"
        left = f", about {duration(elapsed / new * (self.total - self.done))} left" if new else ""
        note = f", {self.note}" if self.note else ""
        return f"{self.words}: {int(self.done)} of {self.total}{left}{note}"

    def __enter__(self) -> Meter:
        if _on:
            self._thread = threading.Thread(target=self._live, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def advance(self, steps: float = 1) -> None:
        """Note that so many more steps are done."""
        self.done += steps

    def _live(self) -> None:
        """Tell how far it is, beside the work."""
        if self._over.wait(AFTER):
            return
        if self._stream.isatty():
            self._bar()
            return
        while not self._over.wait(EVERY if self._told > self._begin else EVERY - AFTER):
            self._told = time.monotonic()
            print(f"- {self.line()}", file=self._stream, flush=True)

    def _bar(self) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        def drawn() -> Table:
            row = Table.grid(padding=(0, 1))
            if self.total is None:
                row.add_row(self.line())
            else:
                row.add_row(ProgressBar(self.total, self.done, width=24), self.line())
            return row

        console = Console(file=self._stream, highlight=False)
        with Live(get_renderable=drawn, console=console, transient=True, refresh_per_second=4):
            self._over.wait()


@contextmanager
def waiting(words: str) -> Iterator[None]:
    """Tell that a stage of unknown length is under way, while the block runs."""
    with Meter(words, None):
        yield


def track(items: Sequence[T], words: str) -> Iterator[T]:
    """Yield items and tell how far they are."""
    with Meter(words, len(items)) as meter:
        for item in items:
            yield item
            meter.advance()
