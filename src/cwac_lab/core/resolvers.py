"""What the configuration leaves to be worked out: what a model is called, how it is aligned, and the rate for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf


def last_part(value: str) -> str:
    """Return the last part of a path or of a repository's id."""
    path = Path(value)
    return path.name if path.name not in ("", "..") else path.resolve().name


def _given(model: Any) -> str | None:
    """Return what a ``model`` group gives by path: its adapter, else its model; None for weights of its option."""
    return model.get("adapter") or model.get("path")


def _name(option: str, *, _parent_: Any) -> str:
    given = _given(_parent_)
    return option if given is None else last_part(str(given))


def _align(option: str, *, _parent_: Any) -> str:
    return option if _given(_parent_) is None else "none"


def _aligned_here(here: float, other: float, *, _root_: Any) -> float:
    return other if _root_.model.align == "none" else here


def register() -> None:
    """Make ``${model_name:OPTION}`` and ``${model_align:OPTION}`` known: OPTION, unless the model is given by path.

    ``${aligned_here:A,B}`` is A for a start that the project taught to refuse, and B for a model that is as it came.
    """
    OmegaConf.register_new_resolver("aligned_here", _aligned_here, replace=True)
    OmegaConf.register_new_resolver("model_name", _name, replace=True)
    OmegaConf.register_new_resolver("model_align", _align, replace=True)
