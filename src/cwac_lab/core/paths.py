"""Where the configuration lives: beside the sources in a checkout, inside the package once installed."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def conf_dir() -> Path:
    """Return the folder of Hydra configs (``conf/`` travels in the wheel as ``cwac_lab/conf``)."""
    installed = PACKAGE / "conf"
    return installed if installed.is_dir() else PACKAGE.parents[1] / "conf"
