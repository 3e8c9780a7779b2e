"""What a cell of a row says: a text, a label, or nothing. One that says something else is a ``ValueError``.

Whoever reads the row adds where it stands.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

_TEXT = "text, a whole number, or a list of one message of the user"
# What a table of messages becomes where somebody writes its cells as plain text.
_MESSAGES = re.compile(r"\s*\[?\s*\{\s*(['\"](role|content|from|value)['\"]\s*:.*){2}[}\]]\s*", re.DOTALL)
_WHOLE = re.compile(r"-?[0-9]{1,9}(\.0*)?")
_BLANK = ("Cc", "Cf", "Zl", "Zp", "Zs")


def is_empty(cell: object) -> bool:
    """Tell whether a cell holds nothing: null, not a number, or a text of white space and invisible characters."""
    if isinstance(cell, str):
        return all(unicodedata.category(character) in _BLANK for character in cell)
    return cell is None or (isinstance(cell, float) and math.isnan(cell))


def _shown(cell: object) -> str:
    shown = repr(cell)
    return shown if len(shown) <= 80 else f"{shown[:80]}..."


def _user_turn(column: str, cell: object) -> str:
    """Return the text of a list that holds one message, of the user."""
    if isinstance(cell, list) and len(cell) == 1 and isinstance(cell[0], dict):
        message = {key: value for key, value in cell[0].items() if value is not None}
        content = message.get("content")
        if message.keys() == {"role", "content"} and message["role"] == "user" and isinstance(content, str):
            return content
    raise ValueError(f"{column}={_shown(cell)}: accepted: {_TEXT}")


def text(cells: Mapping[str, Any], column: str) -> str:
    """Return the text of a cell, with the white space around it; a list of one message of the user is its text.

    Raises:
        KeyError: If the row has no such column.
        ValueError: If the cell is empty or holds something else.
    """
    cell = cells[column]
    if not isinstance(cell, (str, int, type(None))) or isinstance(cell, bool):
        cell = None if is_empty(cell) else _user_turn(column, cell)
    if is_empty(cell):
        raise ValueError(f"{column} is empty")
    given = str(cell)
    if _MESSAGES.fullmatch(given):
        raise ValueError(f"{column}={_shown(given)} is a list of messages in quotes: accepted: {_TEXT}")
    return whole(column, given)


def whole(place: str, given: str) -> str:
    """Return a text that can be written as UTF-8.

    Raises:
        ValueError: If it holds half of a character.
    """
    try:
        given.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{place}={_shown(given)}: half of a character (a lone surrogate)") from None
    return given


def prompt_text(cells: Mapping[str, Any], column: str) -> str:
    """Return the same of a prompt, which a list of one turn, a text, may hold as well.

    Raises:
        KeyError: If the row has no such column.
        ValueError: If the cell is empty or holds something else.
    """
    cell = cells[column]
    one = isinstance(cell, list) and len(cell) == 1 and isinstance(cell[0], str)
    return text({column: cell[0]} if one else cells, column)


def optional_text(cells: Mapping[str, Any], column: str | None) -> str | None:
    """Return the text of a cell, or None where the column or the cell holds nothing.

    Raises:
        ValueError: If the cell holds something else.
    """
    return None if column is None or is_empty(cells.get(column)) else text(cells, column)


def label(cells: Mapping[str, Any], column: str, names: Sequence[str], *, numbered: bool = True) -> str:
    """Return a declared label, given by its name (in any case) or, where they are ``numbered``, its number from 0.

    Raises:
        KeyError: If the row has no such column.
        ValueError: If the cell is no declared label.
    """
    cell = cells[column]
    given = cell.strip() if isinstance(cell, str) else cell
    if isinstance(given, str):
        for name in names:
            if given.casefold() == name.casefold():
                return name
        if _WHOLE.fullmatch(given):
            given = int(given.partition(".")[0])
    if isinstance(given, float) and given.is_integer():
        given = int(given)
    if numbered and type(given) is int and 0 <= given < len(names):
        return names[given]
    accepted = ", ".join(names) + (f", or their numbers 0 to {len(names) - 1}" if numbered else "")
    raise ValueError(f"{column}{' is empty' if is_empty(cell) else f'={_shown(cell)}'}: accepted: {accepted}")


def meets(cell: object, wanted: object) -> bool:
    """Tell whether a cell holds a wanted value, in a file of any format: null is an empty cell, "0" of CSV is 0."""
    if is_empty(wanted):
        return is_empty(cell)
    if isinstance(cell, str) and isinstance(wanted, bool):
        return cell.strip().lower() in (("true", "1") if wanted else ("false", "0"))
    if isinstance(cell, str) and isinstance(wanted, (int, float)):
        try:
            return float(cell) == wanted
        except ValueError:
            return False
    return bool(cell == wanted)
