"""How many tokens a model takes in."""

from __future__ import annotations

from pathlib import Path

from cwac_lab.core.cache import read_json
from cwac_lab.core.errors import ConfigError

# What configurations of the hub call it; none of them where there is no such limit.
_NAMES = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")


def check_context(folder: Path, max_length: int) -> None:
    """Raise ``ConfigError`` if a model folder's context is shorter than ``max_length`` tokens.

    A folder of a tokenizer alone has none.
    """
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    for part in (config, config.get("text_config") or {}):
        for name in _NAMES:
            context = part.get(name)
            if isinstance(context, int) and 0 < context < max_length:
                accepted = f"<= {context}, the tokens that the model takes in ({name} in config.json)"
                raise ConfigError("trainer.max_length", max_length, accepted)
