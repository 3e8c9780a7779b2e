"""Write all that is generated under ``docs/``: ``python -m cwac_lab.docs``, from the top folder of the project."""

from __future__ import annotations

import sys
from pathlib import Path

from cwac_lab.core.cache import write_text
from cwac_lab.core.errors import LabError, MissingAsset
from cwac_lab.docs import keys, long_tables


def main(root: Path) -> None:
    """Write the configuration page, the long tables and the figures that pages show; removes tables of no view.

    Raises:
        MissingAsset: If the folder is not that of the project.
    """
    docs, experiments = root / "docs", root / "experiments"
    for folder in (docs, experiments):
        if not folder.is_dir():
            raise MissingAsset(f"{folder}: no such folder; run this in the top folder of the project")
    write_text(docs / "configuration.md", keys.page())
    pages = long_tables.pages(experiments)
    for name, text in pages.items():
        write_text(docs / "tables" / name, text)
    for file in (docs / "tables").glob("*.md"):
        if file.name not in pages:
            file.unlink()
    drawn = long_tables.draw_shown(experiments, root)
    print(f"written: docs/configuration.md, {len(pages)} pages of docs/tables, {drawn} figures of docs/figures")


if __name__ == "__main__":
    try:
        main(Path())
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
