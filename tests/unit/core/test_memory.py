"""Memory that is given back between the runs of one process."""

import weakref

import pytest

from cwac_lab.core import cli
from cwac_lab.core.errors import LabError
from cwac_lab.core.memory import give_back
from cwac_lab.sweep import runner
from support import tiny


class Node:
    """An object that can be in a circle."""


def test_circles_of_objects_are_collected():
    first, second = Node(), Node()
    first.other, second.other = second, first
    left = weakref.ref(first)
    del first, second
    give_back()
    assert left() is None


def test_a_run_of_a_sweep_gives_back_what_it_held_also_one_that_fails(monkeypatch):
    """What a run's configuration holds, its constraint with layers and bases, is free when memory is given back."""
    left, alive = [], []

    def run(*_):
        held = Node()
        held.me = held
        left.append(weakref.ref(held))
        raise ValueError("it failed")

    real = runner.give_back
    monkeypatch.setattr(runner, "composed", run)
    monkeypatch.setattr(runner, "give_back", lambda: (real(), alive.append(left[0]())))
    found = runner._work(("seed=1",))
    assert (found.status, found.reason) == ("failed", "ValueError: it failed")
    assert alive == [None]


def test_every_job_of_a_multirun_gives_back_what_it_held_also_one_that_fails(monkeypatch, tmp_path):
    calls, real = [], cli.give_back
    monkeypatch.setattr(cli, "give_back", lambda: (calls.append(1), real()))

    def job(config):
        if config.seed == 1:
            raise LabError("it failed")

    with pytest.raises(SystemExit):
        tiny.launch(job, ["-m", "seed=0,1,2", f"output_root={tmp_path}"])
    assert len(calls) == 3
