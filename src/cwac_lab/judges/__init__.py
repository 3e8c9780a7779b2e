"""Judges of answers to prompts, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec

from cwac_lab.core.classes import accepted, located
from cwac_lab.core.errors import ConfigError
from cwac_lab.judges.base import Judge
from cwac_lab.judges.classifier import ClassifierJudge
from cwac_lab.judges.encoder import INSTALL, PACKAGE
from cwac_lab.judges.hub import BeaverDam, JudgeZoo
from cwac_lab.judges.refusal import RefusalJudge

_ZOO = ("strong_reject", "harmbench", "llama_guard_3", "llama_guard_4", "xstest")
JUDGES: dict[str, Callable[[], Judge]] = {
    "refusal": RefusalJudge,
    "classifier": ClassifierJudge,
    "beaver_dam": BeaverDam,
    **{f"judgezoo_{kind}": partial(JudgeZoo, kind) for kind in _ZOO},
}
# What some judges need beyond the project, and how it is installed.
_NEEDED = {
    "classifier": (PACKAGE, INSTALL),
    **{f"judgezoo_{kind}": ("judgezoo", "pip install judgezoo") for kind in _ZOO},
}


def known(name: str) -> None:
    """Check that a name is that of a judge here, or the path of a class that can be imported.

    Raises:
        ConfigError: If not.
    """
    if name in JUDGES:
        return
    if "." not in name:
        raise ConfigError("judges", name, f"{' | '.join(JUDGES)}, or {accepted('Judge')}")
    located("judges", name, "Judge")


def made(name: str) -> Judge:
    """Return the judge of a name, or of the path of a class.

    Raises:
        ConfigError: If it cannot be imported, or lacks what a judge has.
    """
    judge: Judge = JUDGES[name]() if name in JUDGES else located("evaluation.judges", name, "Judge")()
    lacking = [part for part in ("name", "version", "verdicts") if not hasattr(judge, part)]
    if lacking:
        raise ConfigError("evaluation.judges", name, f"a Judge (this one has no {', '.join(lacking)})")
    return judge


def all_made(names: Sequence[str]) -> list[Judge]:
    """Return the judges of some names; records tell them apart by the names that they have themselves.

    Raises:
        ConfigError: If one cannot be made, or two have one name.
    """
    found = [made(name) for name in names]
    own = [judge.name for judge in found]
    if len(set(own)) < len(own):
        raise ConfigError("evaluation.judges", list(names), f"judges of different names, not {', '.join(own)}")
    return found


def check(names: Sequence[str]) -> None:
    """Check that what judges need is installed, and that BeaverDam's repository is there.

    Raises:
        ConfigError: If what one needs is not installed, or two judges have one name.
        MissingAsset: If that repository is neither reachable nor cached.
    """
    for name in names:
        package, command = _NEEDED.get(name, ("cwac_lab", ""))
        if find_spec(package) is None:
            raise ConfigError("evaluation.judges", name, f"other judges, or {command}")
    for judge in all_made(names):
        if isinstance(judge, BeaverDam):
            judge.reach()
