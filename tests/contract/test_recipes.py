"""The number of a recipe is raised where the code that makes its artefact changes."""

import ast

import pytest

from cwac_lab.core.cache import read_json
from cwac_lab.core.recipes import RECIPES
from support import recipes


def moved(kind, held, now):
    """Say what is to be done where a recipe is not as it was written down; None where it is."""
    renew = f"python tests/support/recipes.py {kind}"
    changed = sorted(
        place for place in {*held["code"], *now["code"]} if held["code"].get(place) != now["code"].get(place)
    )
    if changed and held["number"] == now["number"]:
        return (
            f"the code of {kind} changed ({', '.join(changed)}): raise its recipe number in cwac_lab.core.recipes, or, "
            f"if it makes the same bytes, only renew the digest by `{renew}`"
        )
    if now["number"] < held["number"]:
        return f"the recipe number of {kind} was lowered: what an older recipe made would be taken for new"
    return f"the recipe number of {kind} is {now['number']}: renew the digest by `{renew}`" if held != now else None


@pytest.mark.parametrize("kind", RECIPES)
def test_a_recipe_number_is_raised_where_its_code_changes(kind):
    said = moved(kind, read_json(recipes.FILE)[kind], recipes.written(RECIPES[kind]))
    assert said is None, said


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (2, "a", None),
        (2, "b", "the code of x changed (m:f): raise its recipe number"),
        (2, "b", "only renew the digest by `python tests/support/recipes.py x`"),
        (3, "b", "the recipe number of x is 3: renew the digest"),
        (3, "a", "the recipe number of x is 3: renew the digest"),
        (1, "a", "was lowered"),
        (1, "b", "was lowered"),
    ],
)  # fmt: skip
def test_what_is_said_of_a_recipe(number, code, said):
    found = moved("x", {"number": 2, "code": {"m:f": "a"}}, {"number": number, "code": {"m:f": code}})
    assert found is None if said is None else said in found


CODE = 'def f(x: int, most=3):\n    """Say."""\n    y = [x, most]\n    return sum(y) + 1\n'


@pytest.mark.parametrize(
    ("code", "same"),
    [
        (
            CODE.replace("    y", "    # a remark\n\n    y").replace(
                "[x, most]", "[\n        x,\n        most,\n    ]"
            ),
            True,
        ),
        (CODE.replace("Say.", "Say it in other words."), True),
        (CODE.replace("x: int", "x: float").replace("):", ") -> float:"), True),
        ("from cwac_lab import linalg\n" + CODE.replace("    y", "    import math\n    y"), True),
        (CODE.replace("+ 1", "+ 2"), False),
        (CODE.replace("most=3", "most=4"), False),
        (CODE.replace("sum(y)", "sum(y[1:])"), False),
        (CODE.replace("    y = [x, most]\n", "    y = [most, x]\n"), False),
        (CODE.replace("sum", "max"), False),
    ],
)
def test_a_digest_is_of_what_is_computed(code, same):
    assert (recipes.plain(ast.parse(code).body) == recipes.plain(ast.parse(CODE).body)) is same


def test_a_digest_is_of_what_is_named():
    (found,) = recipes.parts("defenses.cwac.subspace.reading:batched")
    assert found.name == "batched"
    (found,) = recipes.parts("run.artefacts:_Workshop._choose")
    assert found.name == "_choose"
    assert len(recipes.parts("defenses.cwac.subspace.solvers")) > 4
    with pytest.raises(LookupError):
        recipes.parts("defenses.cwac.subspace.basis:nothing")
