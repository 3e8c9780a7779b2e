"""Errors that a user can act on: each is one line that names what was wrong and what would be accepted."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real


class LabError(Exception):
    """Base of the errors that the command line prints as one line, without a traceback."""


class ConfigError(LabError):
    """A configuration value that cannot be used; a class that checks its own fields names them without a prefix."""

    def __init__(self, key: str, value: object, accepted: str) -> None:
        """Name the key, the value seen and what would be accepted."""
        self.key, self.value, self.accepted = key, value, accepted
        super().__init__(f"{key}={value}: accepted: {accepted}")


class MissingAsset(LabError):
    """Weights, data or a package that a run needs and that is not there."""


class PoolOverlap(LabError):
    """Two prompt pools share a prompt, so that a measurement would be contaminated."""


class QualityError(LabError):
    """A prepared artefact (aligned model, autoencoder) that is too poor to build on."""


class Diverged(LabError):
    """A training that no longer computes finite numbers; no model comes of it."""


def one_of(key: str, value: object, accepted: Iterable[object]) -> None:
    """Raise ``ConfigError`` unless ``value`` is among the ``accepted`` ones."""
    choices = list(accepted)
    if value not in choices:
        raise ConfigError(key, value, " | ".join(str(choice) for choice in choices))


def in_range(key: str, value: float, low: float, high: float = float("inf"), *, open_low: bool = False) -> None:
    """Raise ``ConfigError`` unless ``low <= value <= high`` (``low < value`` with ``open_low``), a finite number."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not (low < value if open_low else low <= value) or not value <= high or math.isinf(value):
        bracket = "(" if open_low else "["
        end = "inf)" if high == float("inf") else f"{high:g}]"
        raise ConfigError(key, value, f"a number in {bracket}{low:g}, {end}")


def whole(key: str, value: object, low: int) -> None:
    """Raise ``ConfigError`` unless ``value`` is an integer of at least ``low``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ConfigError(key, value, f"an integer >= {low}")
