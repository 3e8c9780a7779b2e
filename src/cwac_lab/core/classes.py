"""Classes that a configuration names: of this package, or of any module that Python can import here."""

from __future__ import annotations

from hydra.utils import get_class

from cwac_lab.core.errors import ConfigError


def located(key: str, target: str, kind: str) -> type:
    """Return the class that a dotted path names; the working folder is among the places that are looked in.

    Args:
        key: Setting that names it.
        target: The path, ``module.Class``.
        kind: What it is to be, for the error.

    Raises:
        ConfigError: If it cannot be imported, or is no class, with the reason.
    """
    try:
        found: type = get_class(target)
    except (ImportError, ValueError) as error:
        raise ConfigError(key, target, f"{accepted(kind)} ({' '.join(str(error).split())})") from None
    return found


def accepted(kind: str) -> str:
    """Return what a setting that names a class takes."""
    return f"the path of a {kind}, module.Class, of cwac_lab or of a module that can be imported here"
