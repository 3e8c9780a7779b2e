"""The tables of a store: a file that names them, each with a query for its runs."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from cwac_lab.core.errors import ConfigError, MissingAsset


def views(file: str | None) -> dict[str, str | None]:
    """Return the tables of a file, each with the query for its runs; without a file one table of all runs.

    Raises:
        MissingAsset: If there is no such file.
        ConfigError: If it does not map names to queries.
    """
    if file is None:
        return {"summary": None}
    if not Path(file).is_file():
        raise MissingAsset(f"views={file}: no such file")
    accepted = "a YAML file that maps names of tables to pandas queries"
    try:
        found = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError("views", file, f"{accepted} ({' '.join(str(error).split())})") from None
    if not isinstance(found, dict) or not found:
        raise ConfigError("views", file, accepted)
    for name, query in found.items():
        if not isinstance(query, str) or not re.fullmatch(r"\w+", str(name)):
            raise ConfigError(f"views: {name}", query, "a name of letters, digits and _, and a pandas query")
    return {str(name): query for name, query in found.items()}
