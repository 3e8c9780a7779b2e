"""Judges of answers to prompts, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cwac_lab.core.classes import accepted, located
from cwac_lab.core.errors import ConfigError
from cwac_lab.judges.base import Judge
from cwac_lab.judges.classifier import ClassifierJudge
from cwac_lab.judges.encoder import INSTALL, PACKAGE
from cwac_lab.judges.endpoint import NAME, Endpoint, EndpointConfig
from cwac_lab.judges.hub import BeaverDam, JudgeZoo
from cwac_lab.judges.refusal import RefusalJudge

_ZOO = ("strong_reject", "harmbench", "llama_guard_3", "llama_guard_4", "wildguard", "xstest")
JUDGES: dict[str, Callable[[], Judge]] = {
    "refusal": RefusalJudge,
    "classifier": ClassifierJudge,
    "beaver_dam": BeaverDam,
    **{f"judgezoo_{kind}": partial(JudgeZoo, kind) for kind in _ZOO},
}
# Those that need no settings, and the one that does.
ENDPOINT = NAME
NAMES = (*JUDGES, ENDPOINT)
# What some judges need beyond the project, and how it is installed.
_NEEDED = {
    "classifier": (PACKAGE, INSTALL),
    **{f"judgezoo_{kind}": ("judgezoo", "pip install judgezoo") for kind in _ZOO},
    # In no release yet (0.1.9 is the newest).
    "judgezoo_wildguard": ("judgezoo.wildguard", "pip install git+https://github.com/LLM-QC/judgezoo"),
}


def known(name: str) -> None:
    """Check that a name is that of a judge here, or the path of a class that can be imported.

    Raises:
        ConfigError: If not.
    """
    if name in NAMES:
        return
    if "." not in name:
        raise ConfigError("judges", name, f"{' | '.join(NAMES)}, or {accepted('Judge')}")
    located("judges", name, "Judge")


def made(name: str, endpoint: EndpointConfig | None = None, cache_root: str | Path = "") -> Judge:
    """Return the judge of a name, or of the path of a class.

    Args:
        name: The name, or the path.
        endpoint: Settings of the judge of that name.
        cache_root: Folder that its replies are kept under.

    Raises:
        ConfigError: If it cannot be imported, or lacks what a judge has.
    """
    if name == ENDPOINT:
        return Endpoint(endpoint or EndpointConfig(), Path(cache_root))
    judge: Judge = JUDGES[name]() if name in JUDGES else located("evaluation.judges", name, "Judge")()
    lacking = [part for part in ("name", "version", "verdicts") if not hasattr(judge, part)]
    if lacking:
        raise ConfigError("evaluation.judges", name, f"a Judge (this one has no {', '.join(lacking)})")
    return judge


def all_made(names: Sequence[str], endpoint: EndpointConfig | None = None, cache_root: str | Path = "") -> list[Judge]:
    """Return the judges of some names; records tell them apart by the names that they have themselves.

    Raises:
        ConfigError: If one cannot be made, or two have one name.
    """
    found = [made(name, endpoint, cache_root) for name in names]
    own = [judge.name for judge in found]
    if len(set(own)) < len(own):
        raise ConfigError("evaluation.judges", list(names), f"judges of different names, not {', '.join(own)}")
    return found


def told(judge: Judge) -> dict[str, Any]:
    """Return what a record says of a judge: its version; of an endpoint what was asked by what, and the cost."""
    return {"version": judge.version, **(judge.told if isinstance(judge, Endpoint) else {})}


def installed(names: Sequence[str]) -> None:
    """Check that the packages that judges need are installed.

    Raises:
        ConfigError: If not.
    """
    for name in names:
        package, command = _NEEDED.get(name, ("cwac_lab", ""))
        try:
            there = find_spec(package) is not None
        except ModuleNotFoundError:  # of a part of a package that is not there
            there = False
        if not there:
            raise ConfigError("evaluation.judges", name, f"other judges, or {command}")


def check(names: Sequence[str], endpoint: EndpointConfig | None = None, cache_root: str | Path = "") -> None:
    """Check that what judges need is there: packages, BeaverDam's repository, the server of an endpoint.

    Raises:
        ConfigError: If it is not, or two judges have one name.
        MissingAsset: If that repository is neither reachable nor cached.
    """
    installed(names)
    for judge in all_made(names, endpoint, cache_root):
        if isinstance(judge, (BeaverDam, Endpoint)):
            judge.reach()
