"""The page of all settings: read from the dataclasses, the composed configuration, and the checks themselves.

What a key means is said in the ``Attributes:`` of its dataclass, once. What is accepted is asked of the check: a value
that cannot be right is put in, and the error says what would be.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from inspect import cleandoc
from typing import Any

import yaml
from hydra.utils import get_class
from omegaconf import OmegaConf

from cwac_lab.config.groups import AlignConfig, DiagnosticsConfig, ExportConfig, ProfileConfig
from cwac_lab.config.run import Run, read
from cwac_lab.core.cli import compose
from cwac_lab.core.errors import ConfigError
from cwac_lab.core.paths import conf_dir
from cwac_lab.data.attacks import AttackConfig
from cwac_lab.data.forms import FormsConfig
from cwac_lab.data.sources import DataConfig
from cwac_lab.data.suites import SuiteConfig
from cwac_lab.defenses.cwac.sae.train import SAEConfig
from cwac_lab.evaluation.settings import EvaluationConfig
from cwac_lab.models.adapters import TuningConfig
from cwac_lab.models.loading import ModelConfig
from cwac_lab.results.store import flat
from cwac_lab.training.settings import GuardConfig, LoggerConfig, TrainerConfig

# In the order of the page; the class of ``task`` and of every ``constraint`` is named by its ``_target_``.
GROUPS: dict[str, type | None] = {
    "model": ModelConfig, "task": None, "data": DataConfig, "sae": SAEConfig, "tuning": TuningConfig,
    "trainer": TrainerConfig, "attack": AttackConfig, "forms": FormsConfig, "align": AlignConfig,
    "guard": GuardConfig, "export": ExportConfig,
    "evaluation": EvaluationConfig, "diagnostics": DiagnosticsConfig, "logger": LoggerConfig, "profile": ProfileConfig,
}  # fmt: skip
# Groups that set keys of others only.
OVERLAYS = ("experiment", "search")
# The field of ``Run`` that a key of the top level becomes, where the two have other names.
_FIELD = {"label": "constraint_name"}
_WRONG: dict[Any, Any] = {str: "?", int: -(10**9), float: -1e9}
# Characters of a value, and settings of an option, that are shown.
_LONGEST, _MOST = 70, 14


@dataclass(frozen=True)
class Key:
    """One setting: its dotted name, and as text its type, default, what is accepted, and what it means."""

    name: str
    kind: str
    default: str
    accepted: str
    meaning: str


def meanings(cls: type) -> dict[str, str]:
    """Return what the docstrings of a class and its bases say of their attributes."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, _, listed = cleandoc(base.__doc__ or "").partition("Attributes:\n")
        for entry in re.findall(r"^    (\w+): ((?:.*\n?)(?:^ {5,}.*\n?)*)", listed, re.MULTILINE):
            found[entry[0]] = " ".join(entry[1].replace("``", "`").split())
    return found


def _kind(hint: Any) -> str:
    """Return a type in words."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join("null" if each is type(None) else _kind(each) for each in inner)
    if origin is list:
        return f"list of {_kind(inner[0])}"
    if origin is dict:
        return f"mapping to {_kind(inner[1])}"
    named = {str: "text", int: "integer", float: "number", bool: "true or false"}
    return named.get(hint, "settings" if is_dataclass(hint) else "any")


def _text(value: Any) -> str:
    """Return a value as YAML would have it, cut where it is long."""
    if value is None or value is True or value is False:
        return {None: "null", True: "true", False: "false"}[value]
    text = f"{value:g}" if isinstance(value, float) else str(value).replace("\n", " ").replace("'", "")
    return (text if len(text) <= _LONGEST else f"{text[:_LONGEST]}...") or '""'


def _plain_type(hint: Any) -> tuple[Any, bool]:
    """Return the type that a wrong value is made of, and whether in a list."""
    inner = [each for each in typing.get_args(hint) if each is not type(None)]
    if typing.get_origin(hint) is list:
        return inner[0], True
    return (inner[0], False) if len(inner) == 1 and typing.get_origin(hint) is not dict else (hint, False)


def accepted(cls: type, name: str, hint: Any, held: dict[str, Any]) -> str:
    """Return what the check of a class says that a field accepts; empty where it takes any value of its type."""
    kind, listed = _plain_type(hint)
    if kind not in _WRONG:
        return ""
    wrong = [_WRONG[kind]] if listed else _WRONG[kind]
    required = {field.name: "" for field in fields(cls) if field.default is field.default_factory is MISSING}
    try:
        cls(**{**required, **held, name: wrong})
    except ConfigError as error:
        return error.accepted.removeprefix("a number in ") if error.key == name else ""
    return ""


def keys_of(cls: type, prefix: str, node: dict[str, Any]) -> Iterator[Key]:
    """Yield the keys of a dataclass, nested ones too.

    Args:
        cls: The dataclass.
        prefix: Dotted name of the group.
        node: Its composed settings, whose values are the defaults.
    """
    hints, told = typing.get_type_hints(cls), meanings(cls)
    known = {field.name for field in fields(cls)}
    plain = {key: value for key, value in node.items() if key in known and not isinstance(value, dict)}
    for field in fields(cls):
        name, hint = f"{prefix}.{field.name}", hints[field.name]
        nested = _settings_in(hint)
        if nested is not None:
            mapped = typing.get_origin(hint) is dict
            yield Key(name, _kind(hint), "see its keys", "", told.get(field.name, ""))
            held = {} if mapped else node.get(field.name) or {}
            yield from keys_of(nested, f"{name}.NAME" if mapped else name, held)
            continue
        default = node.get(field.name, _default(field))
        shown = "see the options" if isinstance(default, dict) and default else _text(default)
        yield Key(name, _kind(hint), shown, accepted(cls, field.name, hint, plain), told.get(field.name, ""))


def _settings_in(hint: Any) -> type | None:
    """Return the dataclass in a type, such as that of ``dict[str, Weights | None]``; None where there is none."""
    if isinstance(hint, type) and is_dataclass(hint):
        return hint
    return next((found for each in typing.get_args(hint) if (found := _settings_in(each)) is not None), None)


def _default(field: Any) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return None if field.default is MISSING else field.default


@cache
def _composed(*overrides: str) -> dict[str, Any]:
    return typing.cast(dict[str, Any], OmegaConf.to_container(compose(overrides), resolve=True))


def top_level() -> Iterator[Key]:
    """Yield the keys that are in no group."""
    hints, told = typing.get_type_hints(Run), meanings(Run)
    for name, default in _composed().items():
        if isinstance(default, dict):
            continue
        field = _FIELD.get(name, name)
        hint = hints[field] | None if default is None else hints[field]
        yield Key(name, _kind(hint), _text(default), _accepted_by_read(name, hint), told.get(field, ""))


def _accepted_by_read(name: str, hint: Any) -> str:
    config = compose([])
    config[name] = _WRONG.get(hint, "?")
    try:
        read(config)
    except ConfigError as error:
        return error.accepted.removeprefix("a number in ") if error.key == name else ""
    return ""


def options(group: str) -> list[str]:
    """Return the options of a group, the default one first."""
    names = sorted(file.stem for file in (conf_dir() / group).glob("*.yaml"))
    listed = yaml.safe_load((conf_dir() / "config.yaml").read_text(encoding="utf-8"))["defaults"]
    default = next((each[group] for each in listed if isinstance(each, dict) and group in each), None)
    return sorted(names, key=lambda name: (name != default, name))


def _said(group: str, option: str) -> str:
    """Return the comment that opens an option's file, else what its class says."""
    lines = (conf_dir() / group / f"{option}.yaml").read_text(encoding="utf-8").splitlines()
    words = [line.removeprefix("# ") for line in lines if line.startswith("# ") and not line.startswith("# @package")]
    first = next((place for place, line in enumerate(lines) if line.startswith("# ") and "@package" not in line), None)
    opens = first is not None and all(line.startswith("#") for line in lines[:first])
    if opens:
        length = next((n for n, line in enumerate(lines[first:]) if not line.startswith("#")), len(lines))
        return " ".join(words[:length])
    node = yaml.safe_load("\n".join(lines)) or {}
    return (get_class(node["_target_"]).__doc__ or "").replace("``", "`").splitlines()[0] if "_target_" in node else ""


def _differs(group: str, option: str) -> str:
    """Return the settings in which an option composes to others than the defaults; the first ones of many."""
    file = conf_dir() / group / f"{option}.yaml"
    if group == "search":  # which composes with the sweeper only
        found = re.findall(r"^ +(constraint\.[\w.]+: .*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
        return ", ".join(f"`{each}`" for each in found)
    before, now = flat(_composed()), flat(_composed(f"{group}={option}"))
    changed = [key for key, value in now.items() if before.get(key, MISSING) != value and "_target_" not in key]
    shown = changed if len(changed) <= _MOST else [key for key in changed if key.count(".") < 2]
    rest = len(changed) - len(shown)
    more = [f"and {rest} more in `conf/{group}/{option}.yaml` and what it names"] if rest else []
    return ", ".join([*(f"`{key}={_text(now[key])}`" for key in shown), *more])


def _table(keys: Iterator[Key]) -> list[str]:
    lines = ["| key | type | default | accepted | meaning |", "| --- | --- | --- | --- | --- |"]
    for key in keys:
        cells = (f"`{key.name}`", key.kind, f"`{key.default}`", key.accepted, key.meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return [*lines, ""]


def _options(group: str, *, differ: bool) -> list[str]:
    head = "| option | what it is |" + (" what it sets otherwise |" if differ else "")
    lines = [head, "| --- " * head.count(" |") + "|"]
    for option in options(group):
        cells = [f"`{group}={option}`", _said(group, option)] + ([_differs(group, option)] if differ else [])
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return [*lines, ""]


def parts(option: str) -> dict[str, dict[str, Any]]:
    """Return the settings of the defence of ``constraint=OPTION`` under its name; nothing for one that names others."""
    text = (conf_dir() / "constraint" / f"{option}.yaml").read_text(encoding="utf-8")
    node = yaml.safe_load(text) or {}
    package = re.match(r"# @package constraint\.(\w+)\n", text)
    return {package[1]: node} if package else {}


def sections() -> Iterator[tuple[str, list[Key]]]:
    """Yield the keys of the page under their headings: the top level, groups, further ones of options, defences."""
    yield "top level", list(top_level())
    for group, cls in GROUPS.items():
        node = _composed()[group]
        keys = list(keys_of(cls or get_class(node["_target_"]), group, node))
        yield group, keys
        names = {key.name for key in keys}
        for option in options(group) if "_target_" in node else ():
            other = _composed(f"{group}={option}")[group]
            more = [key for key in keys_of(get_class(other["_target_"]), group, other) if key.name not in names]
            if more:
                yield f"{group}={option}", more
    for option in options("constraint"):
        for name, node in parts(option).items():
            yield f"constraint={option}", list(keys_of(get_class(node["_target_"]), f"constraint.{name}", node))


# It is no field: each of the names is an option of a group.
_ASKED_SUITES = Key(
    "evaluation.suites", "list of text", "[]", "names of suites, see below",
    "Named suites of prompts that are asked beside the run's own ones.",
)  # fmt: skip


def _suites() -> list[str]:
    """Return the named suites with what each measures, licence and kinds, and the keys of a suite."""
    lines = [
        "## suites\n",
        "Named suites that are asked beside the run's own prompts: `evaluation.suites=[xstest,harmbench]`.",
        "A setting of one that is asked: `suites.xstest.n=50`.\n",
        "| option | what it measures | licence |",
        "| --- | --- | --- |",
    ]
    for option in options("suite"):
        node = yaml.safe_load((conf_dir() / "suite" / f"{option}.yaml").read_text(encoding="utf-8"))
        lines.append(f"| `{option}` | {node['measures']} | {node['licence']} |")
    return [*lines, "", *_table(keys_of(SuiteConfig, "suites.NAME", {}))]


def page() -> str:
    """Return the page of all settings as Markdown."""
    lines = [
        "# Every setting\n",
        "Made by `make docs` from the dataclasses of the code; do not edit. Set a key on the command line, as in",
        "`python -m cwac_lab.train trainer.epochs=2`, and a group by its option, as in",
        "`python -m cwac_lab.train model=qwen`. Defaults are those that `python -m cwac_lab.train` composes. A value",
        "that cannot be used ends in one line that names the key, the value and what is accepted. `NAME` in a key",
        "stands for a name that you choose.\n",
    ]
    for heading, keys in sections():
        group, _, option = heading.partition("=")
        if group == "constraint" and not any(line == "## constraint\n" for line in lines):
            lines += [
                "## constraint\n",
                "What is held during fine-tuning. Two or more at once: `constraint=[weight,lisa]`.\n",
            ]
            lines += _options("constraint", differ=False)
        lines.append(f"### {heading}\n" if option else f"## {heading}\n")
        lines += _table(iter([*keys, _ASKED_SUITES] if heading == "evaluation" else keys))
        if not option and (conf_dir() / group).is_dir():
            lines += _options(group, differ=True)
    lines += _suites()
    for group in OVERLAYS:
        lines += [f"## {group}\n", f"Sets keys of other groups. Off by default; `{group}=NAME` turns one on.\n"]
        lines += _options(group, differ=True)
    return "\n".join(lines).rstrip() + "\n"
