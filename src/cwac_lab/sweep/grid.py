"""The grid of an experiment: a YAML file that lists the cells of a table as overrides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from cwac_lab.core.errors import ConfigError, MissingAsset
from cwac_lab.core.paths import conf_dir
from cwac_lab.data.attacks import ASKING

SUFFIX = ".yaml"
_KEYS = ("title", "fixed", "cells", "start", "profiles")


@dataclass(frozen=True)
class Grid:
    """The cells of one experiment.

    Attributes:
        name: Name of the experiment: that of its file.
        title: What the table is about.
        cells: Overrides of every cell, the seed left out.
        start: Whether the start model itself is the first row.
    """

    name: str
    title: str
    cells: tuple[tuple[str, ...], ...]
    start: bool

    def runs(self, seeds: int) -> list[tuple[str, ...]]:
        """Return the overrides of all runs: each cell with seeds 0 to ``seeds - 1``, and the start once a setting."""
        found = [(*cell, f"seed={seed}") for cell in self.cells for seed in range(seeds)]
        if self.start:
            first = {_setting(cell): (*_setting(cell), "finetune=false") for cell in self.cells}
            found = [*first.values(), *found]
        return list(dict.fromkeys(found))


# What a start model and its answers depend on; the other keys of a cell belong to fine-tuning.
_START = (
    *("model", "task", "data", "profile", "experiment", "evaluation", "align", "attack", "suite", "suites"),
    *("trainer.accelerator", "trainer.max_length", "trainer.precision"),
)


def _setting(cell: tuple[str, ...]) -> tuple[str, ...]:
    def counts(override: str) -> bool:
        key, _, value = override.lstrip("+~").partition("=")
        if key == "attack":
            return _asks(value)
        if key.startswith("attack."):
            return key.removeprefix("attack.") in ASKING
        return key.partition(".")[0] in _START or key in _START

    return tuple(override for override in cell if counts(override))


@cache
def _asks(attack: str) -> bool:
    """Tell whether an attack asks otherwise than the task's template does; one of a user's own folder may."""
    file = conf_dir() / "attack" / f"{attack}.yaml"
    if not file.is_file():
        return True
    settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    return any(settings.get("attack", settings).get(name) for name in ASKING)


def _options(block: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the product of a block's values as overrides."""
    axes = []
    for key, values in block.items():
        several = values if isinstance(values, list) else [values]
        axes.append([f"{key}={_text(value)}" for value in several])
    return list(product(*axes))


def _text(value: Any) -> str:
    """Return a value of YAML as Hydra reads it."""
    if isinstance(value, list):
        return f"[{','.join(map(_text, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{_text(child)}' for key, child in value.items())}}}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def read(file: Path, profile: str) -> Grid:
    """Read an experiment's grid for a profile.

    The file has ``title``; ``fixed``: overrides of all cells; ``cells``: a list of blocks, each the product of its
    values; ``start``: true adds the start model; ``profiles``: per profile, values that replace those of ``fixed``, and
    ``cells`` that replace the others.

    Raises:
        MissingAsset: If there is no such file.
        ConfigError: If the file has unknown keys or no cells.
    """
    name = file.stem
    if not file.is_file():
        known = " | ".join(path.stem for path in find(file.parent, None))
        raise MissingAsset(f"exp={name}: no {file.name} in {file.parent}; accepted: {known}")
    text = _content(file)
    for key in text:
        if key not in _KEYS:
            raise ConfigError(f"{file.name}: {key}", text[key], f"one of the keys {', '.join(_KEYS)}")
    profiles = _block(f"{file.name}: profiles", text.get("profiles"))
    own = dict(_block(f"{file.name}: profiles.{profile}", profiles.get(profile)))
    blocks = own.pop("cells", text.get("cells"))
    if not blocks or not isinstance(blocks, list):
        raise ConfigError(f"{file.name}: cells", blocks, "a list of blocks")
    fixed = {**_block(f"{file.name}: fixed", text.get("fixed")), **own}
    cells = []
    for number, each in enumerate(blocks):
        block = _block(f"{file.name}: cells[{number}]", each)
        rest = {key: value for key, value in fixed.items() if key not in block}
        if "seed" in {**rest, **block}:
            raise ConfigError(
                f"{file.name}: cells[{number}].seed",
                block.get("seed"),
                "no seed in a grid; seeds=N of the command says how many",
            )
        cells += [(f"profile={profile}", *cell) for cell in _options({**rest, **block})]
    return Grid(name, str(text.get("title", name)), tuple(dict.fromkeys(cells)), bool(text.get("start")))


def _content(file: Path) -> Mapping[str, Any]:
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(file.name, " ".join(str(error).split()), "a YAML file") from None
    return _block(file.name, found)


def _block(where: str, found: Any) -> Mapping[str, Any]:
    """Return a block of a grid's file, empty where nothing stands there."""
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise ConfigError(where, found, "a mapping of configuration keys to a value or a list of values")
    return found


def find(root: Path, names: list[str] | None) -> list[Path]:
    """Return the files of the named experiments, or of all."""
    if names is not None:
        return [root / (name + SUFFIX) for name in names]
    return sorted(root.glob("*" + SUFFIX))
