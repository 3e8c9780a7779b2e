"""What a model was made of and on which terms: as its card states it, or as it is known of packaged weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

CARD = "README.md"
# What the hub calls a licence that is none of its list, or several.
OTHER = "other"


@dataclass(frozen=True)
class Origin:
    """What is handed on to whatever is made of a model; the fields are named as in the cards of the hub.

    Attributes:
        base_model: Its repository of the hub, ``ORG/NAME``; None where that is not known.
        license: Its licence, such as ``apache-2.0``; None where its owner states none.
        license_name: Name of a licence that the hub calls ``other``.
        license_link: Address of that one.
    """

    base_model: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None


def origin(folder: Path, repository: str | None = None) -> Origin:
    """Return the origin of a model by its card; one that is not there, or cannot be read, states nothing.

    Args:
        folder: The model's folder.
        repository: Repository of the hub that the folder is a snapshot of, by the name of its commit.
    """
    card = folder / CARD
    if repository is not None and not card.is_file():
        card = _fetched(repository, folder.name) or card
    told = _metadata(card)
    link = _text(told.get("license_link"))
    if link is not None and "://" not in link:  # a file of the repository
        link = f"https://huggingface.co/{repository}/blob/main/{link}" if repository is not None else None
    if len(several := _stated(told.get("license"))) > 1:  # the hub takes one
        return Origin(repository, OTHER, "-and-".join(several), link)
    return Origin(repository, _text(told.get("license")), _text(told.get("license_name")), link)


def _fetched(repository: str, revision: str) -> Path | None:
    """Return the card of a repository; None where there is none, or the hub does not give it."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    # The first base is what the library's client raises for a connection that breaks.
    transport: type[Exception] = HfHubHTTPError.__bases__[0]
    try:
        return Path(hf_hub_download(repository, CARD, revision=revision))
    except (transport, OSError, RuntimeError, ValueError):
        return None


def _metadata(card: Path) -> dict[str, Any]:
    from huggingface_hub import metadata_load

    try:
        return metadata_load(card) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def _stated(value: object) -> list[str]:
    """Return what a card states; some cards state several."""
    return [value] if isinstance(value, str) and value else list(map(str, value)) if isinstance(value, list) else []


def _text(value: object) -> str | None:
    return "-and-".join(_stated(value)) or None


def merged(base: Origin, adapter: Origin) -> Origin:
    """Return the origin of a base with an adapter merged into it: where their terms differ, both are named."""
    if adapter.license == base.license:
        return base
    terms = [each.license_name or each.license or "not-stated" for each in (base, adapter)]
    return Origin(base.base_model, OTHER, f"base-{terms[0]}-adapter-{terms[1]}", None)
