"""Which of two answers is better, with stand-ins for the judge."""

import pytest

from cwac_lab.core.errors import LabError
from cwac_lab.core.stats import wilson
from cwac_lab.evaluation.pairwise import Pair, against, decided, outcomes, pairs, questions, verdict, win_rate


def longer(prompts):
    """A judge that prefers the longer answer, wherever it stands."""
    return [_by(prompt, lambda a, b: "[[A]]" if len(a) > len(b) else "[[B]]") for prompt in prompts]


def first(prompts):
    """A judge that prefers what it reads first."""
    return ["Both are fine. [[A]]"] * len(prompts)


def _by(prompt, choose):
    a, b = (prompt.split(f"[Answer {name}]\n")[1].split(f"\n[End of answer {name}]")[0] for name in "AB")
    return f"Because.\n{choose(a, b)}"


PAIRS = [
    Pair("0", "Why?", "long answer", "short"),
    Pair("1", "Why?", "no", "a better one"),
    Pair("2", "Hm?", "x", "x "),
]


def test_the_one_that_is_preferred_in_both_orders_wins():
    found = outcomes(PAIRS, longer)
    assert [(each.score, each.agreed) for each in found] == [(1.0, True), (0.0, True), (0.5, True)]
    assert [len(each.replies) for each in found] == [2, 2, 0]


def test_a_judge_that_goes_by_the_order_finds_ties_only():
    told = win_rate(outcomes(PAIRS, first))
    assert (told.value, told.wins, told.ties, told.losses, told.disagreed) == (50.0, 0, 3, 0, 2)


def test_both_orders_are_asked_and_nothing_else_differs():
    one, other = questions(PAIRS[0])
    swapped = other.replace("short", "#").replace("long answer", "short").replace("#", "long answer")
    assert one == swapped != other
    assert one.index("Why?") < one.index("long answer") < one.index("short")


def test_braces_in_texts_stay_as_they_are():
    assert "{x} {prompt}" in questions(Pair("0", "{x} {prompt}", "{0}", "{second}"))[0]


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ("[[A]]", "A"), ("A is better. [[B]]", "B"), ("[[A]] would be rash.\n[[C]]", "C"), ("[[D]]", None),
        ("A", None), ("", None), ("[A]", None),
    ],
)  # fmt: skip
def test_a_verdict_is_what_a_reply_ends_with(reply, said):
    assert verdict(reply) == said


RULE = {
    ("A", "B"): (1.0, True), ("B", "A"): (0.0, True), ("C", "C"): (0.5, True), ("A", "A"): (0.5, False),
    ("B", "B"): (0.5, False), ("A", "C"): (0.5, False), ("C", "A"): (0.5, False), (None, "A"): (None, None),
    ("A", None): (None, None),
}  # fmt: skip


@pytest.mark.parametrize(("said", "told"), RULE.items(), ids=str)
def test_the_rule_of_two_orders(said, told):
    assert decided(*said) == told


def test_what_has_no_verdict_does_not_count_and_ties_are_half():
    many = [Pair(str(n), "Why?", "a" * (n + 1), "bbb") for n in range(6)]  # two losses, a tie by hand, three wins

    def judge(prompts):
        replies = longer(prompts)
        replies[10:] = ["I cannot say."] * 2
        replies[4:6] = ["[[C]]"] * 2
        return replies

    told = win_rate(outcomes(many, judge))
    assert (told.wins, told.ties, told.losses, told.unparsable, told.n) == (2, 1, 2, 1, 5)
    expected = wilson(2.5, 5)
    assert (told.value, told.low, told.high) == (50.0, expected.low, expected.high)
    assert win_rate([]).value is None


def test_a_judge_that_does_not_reply_to_all_is_an_error():
    with pytest.raises(LabError, match="the judge gave 1 replies to 4 questions"):
        outcomes(PAIRS, lambda prompts: ["[[A]]"])


def rows(outputs, **more):
    harmful = {"kind": "harmful", "id": "0", "prompt": "Tell me", "output": "No."}
    return [
        harmful,
        *({"kind": "task", "id": str(n), "prompt": f"q{n}", "output": text, **more} for n, text in outputs),
    ]


def test_two_runs_are_compared_on_the_rows_of_the_task():
    told = against(rows([(0, "long one"), (1, "x")]), rows([(1, "yy"), (0, "short")]), longer)
    assert (told.wins, told.losses, told.n) == (1, 1, 2)


def test_a_conversation_is_shown_with_its_turns():
    held = rows([(0, "a")], before=[["user", "Hello"], ["assistant", "Hi"]])
    assert pairs(held, held)[0].prompt == "user: Hello\n\nassistant: Hi\n\nuser: q0"


@pytest.mark.parametrize("other", [[(0, "a")], [(0, "a"), (1, "b"), (2, "c")], [(0, "a"), (3, "b")], []])
def test_runs_on_other_rows_are_not_compared(other):
    with pytest.raises(
        LabError,
        match=f"answer 2 and {len(other)} rows of the task, and share {min(len(other), 2) - (other[1:] == [(3, 'b')])}",
    ):
        against(rows([(0, "a"), (1, "b")]), rows(other), longer)
