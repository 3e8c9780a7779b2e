"""The tables of the fast set leave out combinations, and no value."""

from itertools import combinations, product

import pytest

from support.cover import beyond, cover, some, table


@pytest.mark.parametrize(
    ("sizes", "strength", "at_most"),
    [((22, 5), 1, 22), ((3,), 1, 3), ((2, 2, 2), 2, 4), ((4, 3, 3, 2), 2, 14), ((5, 2), 2, 10), ((2, 2, 2), 3, 8)],
)
def test_every_group_of_values_occurs_in_few_rows(sizes, strength, at_most):
    rows = cover(sizes, strength)
    assert len(rows) == len(set(rows)) <= at_most
    assert set(rows) <= set(product(*map(range, sizes)))
    for group in combinations(range(len(sizes)), strength):
        assert {tuple(row[i] for i in group) for row in rows} == set(product(*(range(sizes[i]) for i in group)))


def test_values_take_turns():
    ways = [way for _, way in cover((22, 5))]
    assert {ways.count(way) for way in range(5)} == {4, 5}


@pytest.mark.parametrize("turn", [0, 1, 7])
def test_a_table_is_the_whole_product_and_marks_what_is_beyond_the_cover(turn):
    rows = table(turn=turn, name={"a": 1, "b": 2, "c": 3}, way=["x", ("y",)]).args[1]
    assert [row.id for row in rows] == ["a-x", "a-way1", "b-x", "b-way1", "c-x", "c-way1"]
    fast = [row.values for row in rows if not row.marks]
    assert len(fast) == 3
    assert {name for name, _ in fast} == {"a", "b", "c"}
    assert {way for _, way in fast} == {"x", ("y",)}


def test_the_rows_beyond_are_exhaustive_or_as_asked():
    assert {mark.name for row in table(name="abc", way="xyz").args[1] for mark in row.marks} == {"exhaustive"}
    assert [[mark.name for mark in row.marks] for row in beyond([("a", 1)])] == [["exhaustive"]]
    assert [[mark.name for mark in row.marks] for row in some("ab", "a")] == [[], ["exhaustive"]]
    assert [[mark.name for mark in row.marks] for row in some("ab", "a", others="slow")] == [[], ["slow"]]


def test_of_some_rows_the_others_are_marked():
    rows = some([("a", 1), ("b", 2)], ("b", 2))
    assert [(row.values, bool(row.marks)) for row in rows] == [(("a", 1), True), (("b", 2), False)]
    assert [row.values for row in some("ab")] == [("a",), ("b",)]
    with pytest.raises(AssertionError, match="one of them"):
        some([("a", 1)], ("a", 2))


def test_another_turn_gives_other_pairs():
    found = [
        {row.values for row in table(turn=turn, name="abcdef", way="xyz").args[1] if not row.marks} for turn in range(3)
    ]
    assert set().union(*found) == set(product("abcdef", "xyz"))


@pytest.mark.parametrize(
    ("strength", "every", "sizes"), [(1, 2, (30, 2)), (1, 2, (29, 5)), (1, 3, (31, 2)), (2, 4, (14, 4, 2))]
)
def test_of_slow_and_fast_rows_both_have_every_value_of_the_short_factors(strength, every, sizes):
    rows = table(strength, every=every, **{f"f{place}": range(size) for place, size in enumerate(sizes)}).args[1]
    fast = [row.values for row in rows if not row.marks]
    slow = [row.values for row in rows if [mark.name for mark in row.marks] == ["slow"]]
    assert len(fast) == pytest.approx((len(fast) + len(slow)) / every, abs=1)
    for place, size in enumerate(sizes[1:], start=1):
        for chosen in (fast, slow):
            assert {values[place] for values in chosen} == set(range(size))
