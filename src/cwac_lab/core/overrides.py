"""Arguments of the command line as Hydra reads them: paths with signs that it takes for its own."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException, OverrideParseException

from cwac_lab.core.errors import LabError

# Settings that hold a path or None, never a number.
PATHS = {
    *("model.path", "data.root", "output_root", "cache_root", "run", "before", "after", "views", "to"),
    *(
        "model.adapter",
        "model.base",
        "model.revision",
        "experiments_root",
        "align.export",
        "hydra.run.dir",
        "hydra.sweep.dir",
    ),
}
# Parts of a plan of pools, which may name pools and lists that the configuration's does not; settings of a suite, whose
# file may leave them out.
_PLAN = re.compile(r"data\.(?:harmful|harmless|lookalike)\.\w+\.\w+|suites\.\w+\.\w+")
# Lists that are named by options of a group.
OF_GROUPS = {"evaluation.suites": "suite"}
_KEY = re.compile(r"[+~]{0,2}[A-Za-z0-9_./@:-]+")


def quoted(value: str, quote: Quote = Quote.single) -> str:
    """Return a text in quotes, as Hydra reads it."""
    return str(QuotedString(text=value, quote=quote).with_quotes())


def _read(argument: str) -> object:
    """Return the value of an argument; what Hydra cannot read stands for itself."""
    try:
        return OverridesParser.create().parse_override(argument).value()
    except HydraException:
        return argument.partition("=")[2]


def as_meant(argument: str) -> str:
    """Return an argument with ``~`` as the home folder, and a path of digits as text.

    Hydra has a meaning of its own for ``~``, and reads ``output_root=2024_10_01`` as the number 20241001. A pool or
    list that is not in the plan of the data yet is added to it. Named suites are options of a group.
    """
    key, equals, value = argument.partition("=")
    if _PLAN.fullmatch(key) and equals:
        return f"++{argument}"
    if key in OF_GROUPS and equals:
        return f"{OF_GROUPS[key]}={value}"
    if not equals or not _KEY.fullmatch(key):
        return argument
    if "~" in value[:2] and ("," not in value or value[0] in "'\""):
        found = _read(argument)
        if isinstance(found, str) and found.startswith("~"):
            home = os.path.expanduser(found)  # pathlib raises where there is no such user
            return argument if home == found else f"{key}={quoted(home)}"
    if key.lstrip("+") in PATHS and isinstance(_read(argument), bool | int | float):
        return f"{key}={quoted(value)}"
    return argument


def parsed(arguments: Iterable[str]) -> list[Override]:
    """Return arguments as Hydra reads them.

    Raises:
        LabError: If it cannot read one.
    """
    try:
        return OverridesParser.create().parse_overrides([as_meant(argument) for argument in arguments])
    except OverrideParseException as error:
        raise LabError(unreadable(error.override, error.message)) from None


def in_order(arguments: Sequence[str]) -> list[str]:
    """Return arguments with flags (``-m``, ``--config-dir FOLDER``) first: Hydra reads none between two overrides."""
    given = [not each.startswith("-") and ("=" in each or each.startswith("~")) for each in arguments]
    return [each for each, _ in sorted(zip(arguments, given, strict=True), key=lambda pair: pair[1])]


def text(key: str, value: object) -> str:
    """Return the argument that gives a key a text, quoted for Hydra where it has to be."""
    plain = re.fullmatch(r"[A-Za-z0-9_./-]+", str(value)) and isinstance(_read(f"{key}={value}"), str)
    return f"{key}={value}" if plain else f"{key}={quoted(str(value))}"


def typed(key: str, value: object) -> str:
    """Return the same as it is typed into a shell."""
    argument = text(key, value)
    return argument if argument == f"{key}={value}" else hint(f"{key}={value}")


def hint(argument: str) -> str:
    """Return an argument quoted for Hydra and, around that, for the shell."""
    key, _, value = argument.partition("=")
    value = value.strip("\"'")
    told = f"{key}={quoted(value)}"
    if re.search(r'[$`"!]', value) and "'" not in value:  # signs of the shell's within double quotes
        return f"'{key}={quoted(value, Quote.double)}'"
    return shlex.quote(told) if re.search(r'[$`"!]|\\\\', told) else f'"{told}"'


def _why(message: str) -> str:
    """Return the reason in what Hydra says: a sign that it does not know is marked below the argument."""
    first, *more = message.strip().splitlines()
    prefix, _, marked = first.partition("LexerNoViableAltException: ")
    if not prefix and marked and more and "^" not in more[0]:  # the argument itself has lines
        return "a line that ends in it"
    if not prefix and marked and more:
        at = more[0].index("^") - (len(first) - len(marked))
        return f"the sign {marked[at]}"
    return first


def unreadable(argument: str, message: str) -> str:
    """Return in one line which argument Hydra cannot read, why by its message, and how to quote it."""
    argument = argument.replace("\n", "\\n")  # told in one line
    key, equals, _ = argument.partition("=")
    if not equals or not _KEY.fullmatch(key):
        return f"{argument}: accepted: KEY=VALUE with a key of the configuration (--help lists them)"
    if argument[len(key) + 1 :][:1] in ("[", "{") and key.lstrip("+") not in PATHS:
        return f"{argument}: Hydra cannot read it ({_why(message)}); accepted: [A,B] or {{KEY:VALUE}}"
    signs = "text with other signs than A-Z a-z 0-9 _ - . / : is quoted twice"
    return f"{argument}: Hydra cannot read it ({_why(message)}); {signs}: {hint(argument)}"


def ambiguous(argument: str) -> str:
    """Return in one line what a value with commas may be."""
    key, _, value = argument.partition("=")
    return f"{argument}: accepted: {hint(argument)} for one text, '{key}=[{value}]' for a list, or -m for a run of each"
