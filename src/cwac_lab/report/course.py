"""How refusals went while a run was trained, as figure and page draw it."""

from __future__ import annotations

from typing import Any

from cwac_lab.results.record import COURSE
from cwac_lab.results.store import Record

# What is drawn, by field of a run's samples.
FIELDS = {
    "harmful_score": "harmful score (%), lower is better",
    "retained_refusals": "retained refusals (%), higher is better",
    "kl": "KL to the start, first tokens (nats)",
}


def followed(run: Record) -> dict[str, list[Any]]:
    """Return ``step`` and, at each step, the ``FIELDS``; empty for a run that was not followed.

    It begins with the start at step 0, which retains all its refusals; a value that is not known is None.
    """
    if not run.has(COURSE):
        return {}
    found = run.read(COURSE)
    start = {"step": 0, "harmful_score": None, "retained_refusals": 100.0, "kl": 0.0} | found.get("start", {})
    return {field: [each[field] for each in (start, *found["samples"])] for field in ("step", *FIELDS)}
