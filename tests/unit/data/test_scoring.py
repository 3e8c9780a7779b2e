"""What counts as right in a task of one's own."""

from __future__ import annotations

import pytest

from cwac_lab.core.errors import ConfigError
from cwac_lab.data.scoring import made

TABLE = [
    ("exact", "  The  LAKE ", "the lake", True),
    ("exact", "the lake.", "the lake", False),
    ("exact", "", "the lake", False),
    ("contains", "It is the\nlake, of course", "The lake", True),
    ("contains", "It is the lakeside", "the lake", False),
    ("contains", "3.14 or so", "3.1", False),
    ("number", "3 + 4 is 7", "7.0", True),
    ("number", "It costs 1,250.50 in all.", "1250.5", True),
    ("number", "It is \u22124", "-4", True),
    ("number", "seven", "7", False),
    ("number", "between 3-5", "5", True),
    ("number", "7", "seven", None),
    ("choice", "The answer is B, not C.", "B", True),
    ("choice", "(c)", "C", False),
    ("choice", "I think the answer is B", "B", True),
    ("choice", "A good choice would be C.", "C", True),
    ("choice", "I would say D", "I think it is B", False),
    ("choice", "B) the lake", "(B)", True),
    ("choice", "Option A", "(A) the lake", True),
    ("choice", "Anna", "A", False),
    ("choice", "B", "the lake", None),
    ("regex", "so #### 12", "12", True),
    ("regex", "so #### 12", "and #### 12", True),
    ("regex", "so 12", "#### 12", False),
]


@pytest.mark.parametrize(("name", "output", "gold", "right"), TABLE)
def test_an_answer_is_right(name, output, gold, right):
    assert made(name, r"#### (\d+)").correct(output, gold) is right


class Longer:
    """A score of a user's own."""

    def correct(self, output, gold):
        return len(output) > len(gold)


def test_a_score_of_ones_own():
    assert made(f"{__name__}.Longer", None).correct("four", "two")


@pytest.mark.parametrize(
    ("name", "pattern", "words"),
    [
        ("nearly", None, r"metric=nearly: accepted: exact \| contains \| number \| choice \| regex, or the path"),
        ("no_such.Score", None, "metric=no_such.Score: accepted: the path of a Score"),
        ("collections.OrderedDict", None, "metric=collections.OrderedDict: accepted: a class with correct"),
        ("regex", None, "pattern=.*: accepted: a regular expression, with metric=regex"),
        ("regex", "(", "pattern=.*: accepted: a regular expression"),
    ],
)
def test_a_score_that_cannot_be_used_is_one_line(name, pattern, words):
    with pytest.raises(ConfigError, match=words):
        made(name, pattern)
