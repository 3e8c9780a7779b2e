"""Memory that is given back between the runs of one process."""

import weakref

from cwac_lab.core.memory import give_back
from cwac_lab.sweep import runner


class Node:
    """An object that can be in a circle."""


def test_circles_of_objects_are_collected():
    first, second = Node(), Node()
    first.other, second.other = second, first
    left = weakref.ref(first)
    del first, second
    give_back()
    assert left() is None


def test_every_run_of_a_sweep_gives_back_what_it_held_also_one_that_fails(monkeypatch):
    calls = []
    monkeypatch.setattr(runner, "give_back", lambda: calls.append(1))
    found = runner.attempt(("harmful_ratio=7",), None)
    assert found.status == "failed"
    assert "harmful_ratio" in found.reason
    assert calls == [1]
