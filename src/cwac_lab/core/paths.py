"""Where the configuration lives: beside the sources in a checkout, inside the package once installed."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def last_part(text: str) -> str:
    """Return of an absolute path its last part; the folders before it name a machine, and often a person."""
    return Path(text).name if Path(text).is_absolute() else text


def conf_dir() -> Path:
    """Return the folder of Hydra configs (``conf/`` travels in the wheel as ``cwac_lab/conf``)."""
    installed = PACKAGE / "conf"
    return installed if installed.is_dir() else PACKAGE.parents[1] / "conf"
