"""Whether two models can be compared, by what their folders say, before any weights are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cwac_lab.core.cache import read_json
from cwac_lab.core.errors import ConfigError
from cwac_lab.models.classes import auto_classes

# What two states of one model share.
_SHAPE = (
    *("model_type", "num_hidden_layers", "hidden_size", "intermediate_size"),
    *("num_attention_heads", "num_key_value_heads", "head_dim"),
)
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")


def _config(key: str, folder: Path) -> dict[str, Any]:
    accepted = "a folder that transformers loads a model from"
    try:
        found = read_json(folder / "config.json")
    except (OSError, ValueError) as error:
        raise ConfigError(key, folder, f"{accepted} (config.json: {error})") from None
    if not isinstance(found, dict):
        raise ConfigError(key, folder, f"{accepted} (config.json is no mapping)")
    return found


def _vocabulary(folder: Path) -> dict[str, int] | None:
    """Return the id of every token, or None without a tokenizer."""
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        return None
    found: dict[str, int] = (
        auto_classes()[1].from_pretrained(folder, local_files_only=True, trust_remote_code=False).get_vocab()
    )
    return found


def check_alike(before: Path, after: Path) -> list[str]:
    """Check that what one model computes can be compared with what the other does, token by token and layer by layer.

    Returns:
        What is left out, and what is taken on trust, each in words.

    Raises:
        ConfigError: If the models are of other shapes, or ids stand for other tokens.
    """
    first, second = _config("before", before), _config("after", after)
    for name in _SHAPE:
        one, other = first.get(name), second.get(name)
        if one != other and None not in (one, other):
            raise ConfigError("after", after, f"a model of the shape of {before}: {name}={one}, not {other}")
    told = []
    rows = first.get("vocab_size"), second.get("vocab_size")
    if rows[0] != rows[1]:
        told.append(f"no KL of first tokens: it needs one vocabulary, these have {rows[0]} and {rows[1]} rows")
    tokens, others = _vocabulary(before), _vocabulary(after)
    if tokens is not None and others is not None:
        moved = next((token for token, place in sorted(tokens.items()) if others.get(token) != place), None)
        if moved is not None:
            there = "has none" if moved not in others else f"is {others[moved]}"
            raise ConfigError(
                "after",
                after,
                f"a model that reads the tokens of {before}: {moved!r} is {tokens[moved]}, here it {there}",
            )
    elif tokens is not None:
        told.append(f"{after} has no tokenizer: its tokens are taken to be those of {before}")
    most = max(tokens.values(), default=0) if tokens else 0
    if rows[1] is not None and most >= rows[1]:
        raise ConfigError("after", after, f"an embedding of all {most + 1} tokens of {before}, not of {rows[1]}")
    if before.samefile(after):
        told.append(f"before and after are one folder, {before}")
    return told
