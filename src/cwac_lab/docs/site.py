"""What mkdocs is told beyond ``mkdocs.yml``: the pages at the top of the project, and links to files of the code.

A site of the documents holds no code, so a link to a file outside of ``docs`` becomes the file's path.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

# Pages of the site that lie at the top of the project.
TOP = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def rewritten(text: str, at: str) -> str:
    """Return a page of the project as the site has it.

    Args:
        text: Markdown.
        at: Folder of the page, seen from the top of the project: ``docs``, ``docs/tables`` or nothing.
    """

    def link(found: re.Match[str]) -> str:
        shown, words, target = found.groups()
        path, hash_, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target) or not path:
            return found[0]
        top = Path(*(part for part in _parts(Path(at) / path)))
        if top.as_posix() in TOP:
            return f"{shown}[{words}]({_back(at)}{TOP[top.as_posix()]}{hash_}{anchor})"
        if top.parts[0] == "docs":
            return f"{shown}[{words}]({_back(at)}{top.relative_to('docs').as_posix()}{hash_}{anchor})"
        return f"{words} (`{top.as_posix()}`)" if words.strip("`") != top.as_posix() else f"`{top.as_posix()}`"

    return _LINK.sub(link, text)


def _parts(path: Path) -> list[str]:
    found: list[str] = []
    for part in path.parts:
        found = found[:-1] if part == ".." else [*found, part]
    return found


def _back(at: str) -> str:
    """Return the way from a folder of the project to the top of the site."""
    return "../" * (len(Path(at).parts) - 1)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that lie at the top of the project."""
    from mkdocs.structure.files import File  # installed by `make site` only

    root = Path(config.config_file_path).parent
    for name, page in TOP.items():
        files.append(File.generated(config, page, content=(root / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrite the links of a page."""
    place = page.file.src_uri
    at = "" if place in TOP.values() else (Path("docs") / place).parent.as_posix()
    return rewritten(markdown, at)
