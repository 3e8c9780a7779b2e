"""Values beside their declared types: what is read is what the code takes it for, or one line says where it is not."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from types import UnionType
from typing import Annotated, Any, NotRequired, Union, get_args, get_origin, get_type_hints, is_typeddict

# Characters of a wrong value that an error shows.
SHOWN = 60


@dataclass(frozen=True)
class Says:
    """What a field means.

    Attributes:
        meaning: In words.
        unit: Its unit, ``%`` or ``s`` say; empty for what has none.
        better: ``lower`` or ``higher``; empty for what is neither good nor bad.
    """

    meaning: str
    unit: str = ""
    better: str = ""


class Misfit(Exception):
    """A value that is not of its declared type."""

    def __init__(self, field: str, value: object, accepted: str) -> None:
        """Name the field by its dotted path, the value and what is accepted."""
        seen = repr(value)
        seen = seen if len(seen) <= SHOWN else f"{seen[:SHOWN]}..."
        super().__init__(f"{field or 'the whole'}={seen}: accepted: {accepted}")


_MISSING = "missing"
_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}


def check(kind: Any, value: Any, field: str = "", others: Any = None) -> None:
    """Check a JSON value against a type.

    Args:
        kind: A ``TypedDict``, ``dict``, ``list``, union, plain type or ``Any``; annotations are passed over.
        value: The value.
        field: Its dotted path, for errors.
        others: The type of fields that a ``TypedDict`` does not name; None: they are not looked at.

    Raises:
        Misfit: If it does not fit.
    """
    kind, origin = _bare(kind), get_origin(_bare(kind))
    if kind is Any:
        return
    if is_typeddict(kind):
        _named(kind, value, field, others)
    elif origin in (Union, UnionType):
        _one_of(kind, value, field)
    elif origin is dict:
        for name, child in _of(dict, value, field, "a mapping").items():
            check(get_args(kind)[1], child, _below(field, name))
    elif origin is list:
        for number, child in enumerate(_of(list, value, field, "a list")):
            check(get_args(kind)[0], child, _below(field, number))
    elif not _plain(kind, value):
        raise Misfit(field, value, _WORDS[kind])


def _named(kind: Any, value: Any, field: str, others: Any) -> None:
    hints = _hints(kind)
    found = _of(dict, value, field, "a mapping")
    for name, hint in hints.items():
        if name in found:
            check(hint, found[name], _below(field, name))
        elif get_origin(hint) is not NotRequired:
            raise Misfit(_below(field, name), _MISSING, "a value")
    for name in found.keys() - hints.keys() if others is not None else ():
        check(others, found[name], _below(field, name))


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _one_of(kind: Any, value: Any, field: str) -> None:
    """Check a union: a value of several kinds, of which one may have parts of its own."""
    kinds = get_args(kind)
    whole = [each for each in kinds if each not in _WORDS]
    if any(_plain(each, value) for each in kinds if each in _WORDS):
        return
    if not whole:
        raise Misfit(field, value, " or ".join(_WORDS[each] for each in kinds))
    check(whole[0], value, field)


def _plain(kind: Any, value: Any) -> bool:
    """Tell whether a value is of a plain type; a truth value is no number, a whole number is a number."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _of(kind: type, value: Any, field: str, words: str) -> Any:
    if not isinstance(value, kind):
        raise Misfit(field, value, words)
    return value


def _bare(kind: Any) -> Any:
    while get_origin(kind) in (Annotated, NotRequired):
        kind = get_args(kind)[0]
    return kind


def _below(field: str, name: object) -> str:
    return f"{field}.{name}".lstrip(".")
