"""Rows of one's own in parts: by their number, with nothing shared, and what is left out is told."""

from collections import Counter

import pytest

from cwac_lab.core.errors import ConfigError
from cwac_lab.data.own_parts import part
from cwac_lab.data.tasks.base import TaskRow
from cwac_lab.models.templates import Turn

SIZES = {"n_validation": 0, "n_test": 100}


def row(number, *prompts, answer="yes"):
    before = [turn for prompt in prompts[:-1] for turn in (Turn("user", prompt), Turn("assistant", "go on"))]
    return TaskRow(f"chat/{number}", prompts[-1], answer, answer, tuple(before))


MANY = [row(i, "Hello", f"What is {i}?") for i in range(900)] + [row(900 + i, f"Which is {i}?") for i in range(100)]


@pytest.mark.parametrize("seed", range(8))
def test_a_tenth_of_the_rows_is_held_out_however_many_begin_alike(seed):
    found = part(MANY, None, (), seed=seed, n_validation=50, n_test=50)
    assert [len(found.train), len(found.validation), len(found.test)] == [900, 50, 50]
    assert found.remarks == ["50 of 1000 rows are held out to test on", "50 rows are held out to tune on"]


def test_where_every_prompt_has_more_rows_than_are_asked_for_the_rarest_is_held_out():
    rows = [row(i, "Hello") for i in range(30)] + [row(30 + i, "Bye") for i in range(20)]
    found = part(rows, None, (), seed=0, **SIZES)
    assert [each.prompt for each in found.test] == ["Bye"] * 5
    assert found.remarks == ["5 of 50 rows are held out to test on; 15 others that begin as they do are left out"]
    with pytest.raises(ConfigError, match=r"data.n_validation=3: accepted: 0, or fewer"):
        part(rows, None, (), seed=0, n_validation=3, n_test=100)
    with pytest.raises(ConfigError, match="at least one prompt for each part"):
        part(rows[:30], None, (), seed=0, **SIZES)


def test_rows_that_begin_as_a_test_row_does_are_left_out_and_counted():
    found = part(MANY, [row(0, "hello", "How are you?")], (), seed=0, **SIZES)
    assert len(found.train) == 100
    assert found.remarks == ["900 of 1000 rows to train on are left out: they begin as a row to test on does"]


def test_of_many_test_rows_a_sample_is_asked_whatever_their_order():
    given = [row(i, f"Tell {i}", answer="AB"[i >= 300]) for i in range(600)]
    found = part(MANY, given, (), seed=0, **SIZES)
    counted = Counter(each.response for each in found.test)
    assert sum(counted.values()) == 100
    assert min(counted.values()) > 30
    assert [each.id for each in found.test] == sorted((each.id for each in found.test), key=lambda name: int(name[5:]))
    assert found.remarks == ["100 of 600 rows to test on are asked, drawn (data.n_test)"]
    assert part(MANY, given, (), seed=0, **SIZES) == found


def test_rows_that_ask_what_a_prompt_list_asks_are_counted():
    found = part(MANY, [row(0, "Tell"), row(1, "A secret")], {"a secret", "which is 3"}, seed=0, **SIZES)
    assert found.remarks == [
        "1 of 1000 rows to train on are left out: they ask what a prompt list asks",
        "1 of 2 rows to test on are left out: they ask what a prompt list asks",
    ]
