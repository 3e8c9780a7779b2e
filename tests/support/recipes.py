"""The number of every recipe, beside a digest of the code that makes its artefact: ``recipes.json``.

Where that code has changed, ``python tests/support/recipes.py KIND ...`` writes down what it is now. Raise the number
in ``cwac_lab.core.recipes`` first, unless the new code makes the same bytes of the same inputs.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

from cwac_lab.core import classes
from cwac_lab.core.cache import digest, read_json, write_json
from cwac_lab.core.paths import PACKAGE
from cwac_lab.core.recipes import RECIPES, Recipe

FILE = Path(__file__).with_suffix(".json")
# Types change nothing that is computed, nor do lines and columns.
_LEFT_OUT = ("annotation", "returns", "type_comment", "type_params", "kind")


def plain(node: Any) -> Any:
    """Return a syntax tree as JSON, without comments, docstrings, imports and types; alike in all Pythons."""
    return classes.plain(node, _said, _LEFT_OUT)


def _said(node: Any) -> bool:
    """Tell whether a statement is a docstring or an import."""
    return classes.docstring(node) or isinstance(node, ast.Import | ast.ImportFrom)


def _named(body: list[ast.stmt], name: str) -> ast.stmt:
    """Return the function, class or constant of a name, as it is defined there.

    Raises:
        LookupError: If there is none.
    """
    for node in body:
        assigned = {
            each.id for each in ast.walk(node) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)
        }
        if name == getattr(node, "name", None) or (name in assigned and not hasattr(node, "name")):
            return node
    raise LookupError(name)


def parts(place: str) -> list[ast.stmt]:
    """Return the statements at ``module`` or ``module:name.name``."""
    module, _, path = place.partition(":")
    body = ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")).body
    for name in path.split(".") if path else ():
        found = _named(body, name)
        body = getattr(found, "body", [])
        if name == path.rpartition(".")[2]:
            return [found]
    return body


def written(recipe: Recipe) -> dict[str, Any]:
    """Return what ``FILE`` holds of a recipe when it is up to date."""
    code = {place: digest(plain(parts(place)))[:12] for place in sorted(set(recipe.code))}
    return {"number": recipe.number, "code": code}


def renew(kinds: list[str]) -> None:
    """Write down what some kinds are now."""
    unknown = sorted(set(kinds) - set(RECIPES))
    if unknown or not kinds:
        sys.exit(f"kinds: {' '.join(unknown) or 'none given'}; accepted: {' '.join(RECIPES)}")
    held = read_json(FILE) if FILE.is_file() else {}
    write_json(FILE, {kind: written(RECIPES[kind]) if kind in kinds else held.get(kind) for kind in RECIPES})


if __name__ == "__main__":
    renew(sys.argv[1:])
