"""From a node of the configuration to an object of a dataclass, or one line that names what does not fit."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from functools import lru_cache
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from cwac_lab.core.classes import accepted, located
from cwac_lab.core.errors import ConfigError

T = TypeVar("T")


def _construct(key: str, cls: type[T], node: DictConfig) -> T:
    values: dict[str, Any] = {}
    for name in node:
        part, field_name = node[name], str(name)
        kind = OmegaConf.get_type(node, field_name) if isinstance(part, DictConfig) else None
        if isinstance(part, DictConfig) and kind is not None and is_dataclass(kind):
            values[field_name] = _construct(f"{key}.{field_name}", kind, part)
        else:
            values[field_name] = OmegaConf.to_object(part) if OmegaConf.is_config(part) else part
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{key}.{error.key}", error.value, error.accepted) from None


@lru_cache(maxsize=1024)
def _merged(cls: type, text: str) -> Any:
    """Return checked settings; runs of a sweep share most of theirs, and checking takes most of the time of reading."""
    return OmegaConf.merge(OmegaConf.structured(cls), json.loads(text))


def mapping(key: str, node: Any) -> dict[str, Any]:
    """Return a node that has settings of its own.

    Raises:
        ConfigError: If it has none.
    """
    if not isinstance(node, dict):
        raise ConfigError(key, node, "a mapping of settings to values")
    return node


def bind(key: str, cls: type[T], node: Any) -> T:
    """Return an instance of a dataclass from plain settings; unknown keys and wrong types are errors.

    Raises:
        ConfigError: Naming the full key, the value, and what would be accepted.
    """
    try:
        text = json.dumps(mapping(key, node))
    except TypeError:
        raise ConfigError(key, node, "text, numbers, lists and mappings") from None
    try:
        merged = _merged(cls, text)  # type: ignore[arg-type]  # a class is hashable
    except OmegaConfBaseException as error:
        inner = str(error.full_key or "").removeprefix("_target_")
        accepted = f"a value that fits ({str(error).splitlines()[0]})"
        if isinstance(error, ConfigKeyError):
            known = [field.name for field in fields(error.object_type)] if is_dataclass(error.object_type) else []
            accepted = f"one of the keys {', '.join(known)}"
        seen = OmegaConf.select(OmegaConf.create(node), inner)
        raise ConfigError(f"{key}.{inner}".rstrip("."), seen, accepted) from None
    assert isinstance(merged, DictConfig)
    return _construct(key, cls, merged)


def _without_targets(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _without_targets(each) for key, each in value.items() if key != "_target_"}


def bind_target(key: str, base: type[T], node: Any) -> T:
    """Return the object that a node's ``_target_`` names; any class of the right base that can be imported here.

    Raises:
        ConfigError: If the class cannot be imported or is of another kind, or its fields do not fit.
    """
    target = str(mapping(key, node).get("_target_", ""))
    cls = located(f"{key}._target_", target, base.__name__)
    if not issubclass(cls, base):
        raise ConfigError(f"{key}._target_", target, accepted(base.__name__))
    return bind(key, cls, _without_targets(node))
