"""Workers of a sweep end with it, whatever signal it gets; Ctrl-C, which reaches them too, is not the only one."""

import os
import subprocess
import sys
import time

import psutil
import pytest

from support.cover import some

STUCK = """
import os, time
from pathlib import Path

def work(overrides):
    Path(overrides[0]).write_text(str(os.getpid()))
    time.sleep(120)
"""
SWEEP = """
import sys
import stuck
from cwac_lab.sweep import runner

if __name__ == "__main__":
    runner._work = stuck.work
    list(runner.outcomes([(path,) for path in sys.argv[1:]], 2, None))
"""


def until(condition, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.1)


def runs(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.slow
@pytest.mark.parametrize("way", some(["terminate", "kill"], "kill"))
def test_workers_end_with_a_sweep_that_is_stopped(way, tmp_path):
    (tmp_path / "stuck.py").write_text(STUCK)
    (tmp_path / "sweep.py").write_text(SWEEP)
    said = [tmp_path / name for name in ("first", "second", "third", "fourth")]
    path = os.pathsep.join([str(tmp_path), *sys.path])
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "sweep.py"), *map(str, said)], env={**os.environ, "PYTHONPATH": path}
    )
    try:
        until(lambda: all(each.exists() and each.read_text() for each in said[:2]))
        workers = [int(each.read_text()) for each in said[:2]]
        assert all(map(runs, workers))
        getattr(process, way)()
        process.wait(30)
        until(lambda: not any(map(runs, workers)), 15)
    finally:
        process.kill()
    assert not any(each.exists() for each in said[2:])
