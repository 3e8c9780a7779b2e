"""What produced a record: versions, commit, machine; seconds and peak memory of each stage."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil

from cwac_lab import __version__
from cwac_lab.core.cache import digest, file_digest
from cwac_lab.core.paths import PACKAGE, conf_dir

_PACKAGES = (
    "torch",
    "transformers",
    "lightning",
    "hydra-core",
    "omegaconf",
    "datasets",
    "safetensors",
    "sae-lens",
    "peft",
)


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=PACKAGE, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def sources() -> str:
    """Return the SHA-256 (hex) of this package and its configuration, names of files included, as they are now."""
    mine = [path for kind in ("py", "csv", "yaml") for path in PACKAGE.rglob(f"*.{kind}")]
    found = {str(path.relative_to(PACKAGE)): path for path in mine}
    found |= {f"conf/{path.relative_to(conf_dir())}": path for path in conf_dir().rglob("*.yaml")}
    return digest([sorted(found), file_digest(found[name] for name in sorted(found))])


def describe() -> dict[str, Any]:
    """Return versions, git commit and dirty flag (None outside a checkout), and the machine in words."""
    import torch

    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "cwac_lab": __version__,
        "sources": sources(),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": None if changes is None else bool(changes),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _uses_gpu() -> bool:
    """Tell whether this process computes on a GPU; to ask it otherwise would take memory there."""
    import torch

    return bool(torch.cuda.is_available() and torch.cuda.memory_reserved())


@dataclass
class StageMeter:
    """Wall seconds and peak memory (GB) of named stages of one process.

    Resident memory is sampled every 0.1 s. Where the process uses a GPU, ``peak_gpu_memory_gb`` is the most that torch
    had in use there at once.
    """

    stages: dict[str, dict[str, float]] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure the enclosed block; a stage entered twice adds its seconds and keeps its higher peaks."""
        import torch

        process, done = psutil.Process(), threading.Event()
        peak = process.memory_info().rss

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.1):
                peak = max(peak, process.memory_info().rss)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        if _uses_gpu():
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - begin
            done.set()
            watcher.join()
            peak = max(peak, process.memory_info().rss)
            peaks = {"peak_memory_gb": peak}
            if _uses_gpu():
                peaks["peak_gpu_memory_gb"] = torch.cuda.max_memory_allocated()
            before = self.stages.get(name, {"seconds": 0.0})
            self.stages[name] = {
                "seconds": round(before["seconds"] + seconds, 3),
                **{kind: max(before.get(kind, 0.0), round(found / 1e9, 3)) for kind, found in peaks.items()},
            }
