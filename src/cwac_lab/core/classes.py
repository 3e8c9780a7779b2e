"""Classes that a configuration names: of this package, or of any module that Python can import here."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable, Collection
from typing import Any

from hydra.utils import get_class

from cwac_lab.core.cache import digest
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


def outside(cls: type) -> bool:
    """Tell whether a class is of another package than this one."""
    return cls.__module__.partition(".")[0] != __name__.partition(".")[0]


def source(key: str, cls: type) -> str:
    """Return the hash of the module of a class, and of those of its bases that are outside this package.

    Comments, docstrings and layout do not count; what else these modules import is not looked at.

    Args:
        key: Setting that names the class, for the error.
        cls: The class.

    Raises:
        ConfigError: If a module has no source that can be read.
    """
    own = (each.__module__ for each in cls.__mro__ if outside(each))
    modules = {name for name in own if name.partition(".")[0] not in sys.stdlib_module_names}
    try:
        trees = [ast.parse(inspect.getsource(sys.modules[name])) for name in sorted(modules)]
    except (OSError, TypeError, SyntaxError) as error:
        accepted = f"a class of a module with a source that can be read, as it is part of a run's key ({error})"
        raise ConfigError(key, f"{cls.__module__}.{cls.__qualname__}", accepted) from None
    return digest([plain(tree) for tree in trees])


def docstring(node: Any) -> bool:
    """Tell whether a statement is text that stands for itself."""
    text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return text and isinstance(node.value.value, str)


def plain(node: Any, left_out: Callable[[Any], bool] = docstring, unnamed: Collection[str] = ()) -> Any:
    """Return a syntax tree as JSON, without comments and lines; alike in all Pythons.

    Args:
        node: The tree, or a part of one.
        left_out: Tells which statements are left out.
        unnamed: Fields of nodes that are left out.
    """
    if isinstance(node, list):
        return [plain(each, left_out, unnamed) for each in node if not left_out(each)]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = ((name, value) for name, value in ast.iter_fields(node) if name not in unnamed)
    parts = {name: plain(value, left_out, unnamed) for name, value in fields}
    return [type(node).__name__, {name: part for name, part in parts.items() if part not in ([], "None")}]
