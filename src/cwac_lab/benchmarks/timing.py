"""What a benchmark of training times: which ways, how many steps a round, how many rounds.

``+benchmark.ways=[none,coupled] +benchmark.steps=12 +benchmark.rounds=1`` on the command line of a benchmark. What a
constraint does every so many steps is in rounds of 12 as often as in a long training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from cwac_lab.core.errors import ConfigError

# The first steps pay for memory that is touched for the first time.
WARM_UP = 3


class Timing(NamedTuple):
    """Ways to time (``None`` for all), timed steps a round, and rounds; steps come after ``WARM_UP`` others."""

    ways: list[str] | None
    steps: int
    rounds: int

    def only(self, known: Sequence[str]) -> list[str]:
        """Return which of the known ways are timed, in their order; the first one is what the others are beside.

        Raises:
            ConfigError: If one that was asked for is not known.
        """
        for way in self.ways or []:
            if way not in known:
                raise ConfigError("benchmark.ways", way, " | ".join(known))
        return [way for way in known if self.ways is None or way in self.ways or way == known[0]]


def split_off(config: DictConfig, steps: int, rounds: int) -> tuple[DictConfig, Timing]:
    """Return a configuration without what is for the benchmark, and that, with defaults where it is not given.

    Raises:
        ConfigError: If a key or a value is none of a benchmark.
    """
    plain, strict = config.copy(), OmegaConf.is_struct(config)
    OmegaConf.set_struct(plain, False)
    given: Any = plain.pop("benchmark", {})
    OmegaConf.set_struct(plain, strict)
    given = OmegaConf.to_container(given) if OmegaConf.is_config(given) else given
    found = {"ways": None, "steps": steps, "rounds": rounds}
    if not isinstance(given, dict):
        raise ConfigError("benchmark", given, f"a mapping with {' | '.join(found)}")
    for key, value in given.items():
        if key not in found:
            raise ConfigError(f"benchmark.{key}", value, " | ".join(found))
        lists = key == "ways" and isinstance(value, list) and value
        if not lists and (key == "ways" or not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ConfigError(f"benchmark.{key}", value, "a list of ways" if key == "ways" else "an integer >= 1")
        found[key] = value
    return plain, Timing(**found)  # type: ignore[arg-type]
