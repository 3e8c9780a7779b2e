"""Records of schema 2, as records of today: settings that came later, classes that moved, a judge without a version.

They are read. No new run has their keys, so that none is taken for one of them.
"""

from __future__ import annotations

import copy
from typing import Any

SCHEMA = 2
# What had no setting of its own then, and what all runs of then did.
THEN: dict[str, Any] = {
    "tuning": {"method": "full"},
    "evaluation.engine": "hf",
    "evaluation.judges": ["refusal"],
    "data.near": "exact",
    "attack": {
        **{"name": "mixed", "rows": "harmful", "ratio": None, "candidates": 4, "prefix": "", "prefill": ""},
        **{"template": None, "abliterate": False},
    },
    "forms": {"name": "own", "others": {}},
    "trainer.devices": 1,
}
# The same of parts that not every run has: the weight constraint, and LoRA.
THEN_OF_WEIGHT = {"gradient_share": 1.0, "restore_every_n_steps": 1}
THEN_OF_LORA = {"base": "float32"}
# Where the classes of then are today.
MOVED = {
    "cwac_lab.constraints.": "cwac_lab.defenses.cwac.",
    "cwac_lab.baselines.": "cwac_lab.defenses.literature.",
}
# Judges had no versions; all verdicts were made by this one of the refusal judge.
UNVERSIONED: dict[str, Any] = {"refusal": {"version": "3be1e32bf591cd0e"}}


def configuration(found: dict[str, Any]) -> dict[str, Any]:
    """Return a resolved configuration with all that later settings said; one that has them is left as it is."""
    told = _at_home(copy.deepcopy(found))
    for path, value in THEN.items():
        *parents, name = path.split(".")
        node = told
        for parent in parents:
            node = node.setdefault(parent, {})
        node.setdefault(name, copy.deepcopy(value))
    _fill(told.get("constraint", {}).get("weight"), THEN_OF_WEIGHT)
    _fill(told["tuning"] if told["tuning"].get("method") == "lora" else None, THEN_OF_LORA)
    return told


def _fill(part: dict[str, Any] | None, then: dict[str, Any]) -> None:
    """Set what a part of the configuration does not say, where there is such a part."""
    if part is not None:
        part.update({**then, **part})


def upgraded(found: dict[str, Any], schema: int, *, judged: bool) -> dict[str, Any]:
    """Return metrics (``judged``) or provenance with what records of today tell."""
    judges = {"judges": found.get("judges") or UNVERSIONED} if judged else {}
    return {**found, **judges, "schema": schema, "made_under": SCHEMA}


def _at_home(node: Any) -> Any:
    """Return a configuration whose classes are named by where they are today."""
    if isinstance(node, dict):
        return {key: _moved(child) if key == "_target_" else _at_home(child) for key, child in node.items()}
    return node


def _moved(target: str) -> str:
    for then, now in MOVED.items():
        if target.startswith(then):
            return now + target.removeprefix(then)
    return target
