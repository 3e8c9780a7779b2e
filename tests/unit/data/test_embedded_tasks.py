"""Check the embedded task generators: shape, balance, determinism and correct answers."""

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cwac_lab.data.embedded import abstracts as studies
from cwac_lab.data.embedded.abstracts import abstracts
from cwac_lab.data.embedded.exercises import exercises
from cwac_lab.data.embedded.news import LABELS, news
from cwac_lab.data.embedded.problems import MAX_RESULT, word_problems
from cwac_lab.data.embedded.reviews import _with_articles, reviews
from cwac_lab.data.embedded.sampling import MAX_ROWS, distinct_rows, fill, load_words

Generator = Callable[[int, int], list[dict[str, Any]]]

# Generator, the columns with their types, and how many of the first columns make up the prompt.
TASKS: dict[str, tuple[Generator, dict[str, type], int]] = {
    "reviews": (reviews, {"sentence": str, "label": int}, 1),
    "news": (news, {"text": str, "label": str}, 1),
    "word_problems": (word_problems, {"question": str, "answer": str}, 1),
    "abstracts": (abstracts, {"question": str, "context": dict, "final_decision": str}, 1),
    "exercises": (exercises, {"instruction": str, "input": str, "output": str}, 2),
}
EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
# Numbers that a question states in words, and the word that states them.
IN_WORDS = {2: ("twice", "half")}


def asked(task: str, row: dict[str, Any]) -> str:
    """Return the text of a row that must not occur twice."""
    return " ".join(list(row.values())[: TASKS[task][2]])


every_task = pytest.mark.parametrize("task", TASKS)


@pytest.fixture(scope="module")
def samples() -> dict[str, list[dict[str, Any]]]:
    return {task: generator(4000, 17) for task, (generator, _, _) in TASKS.items()}


@pytest.fixture(scope="module")
def all_reviews() -> list[dict[str, Any]]:
    return reviews(MAX_ROWS, 9)


def equations(answer: str) -> list[tuple[int, str, int, int]]:
    return [(int(a), symbol, int(b), int(c)) for a, symbol, b, c in EQUATION.findall(answer)]


def strings(node: Any) -> Iterator[Any]:
    """Yield the leaves of a resource, leaving out its number ranges."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key not in ("ranges", "numbers"):
                yield from strings(value)
    elif isinstance(node, list):
        for value in node:
            yield from strings(value)
    else:
        yield node


@every_task
def test_rows_have_the_hub_columns(task: str, samples: dict[str, list[dict[str, Any]]]) -> None:
    for row in samples[task]:
        assert {column: type(value) for column, value in row.items()} == TASKS[task][1]
        assert tuple(row) == tuple(TASKS[task][1])


@every_task
def test_four_thousand_rows_are_distinct(task: str, samples: dict[str, list[dict[str, Any]]]) -> None:
    texts = {" ".join(re.findall(r"\w+", asked(task, row).casefold())) for row in samples[task]}
    assert len(texts) == len(samples[task]) == 4000


@every_task
def test_texts_are_clean(task: str, samples: dict[str, list[dict[str, Any]]]) -> None:
    for row in samples[task]:
        for text in map(str, strings(row)):
            assert not re.search(r"[{}|]|  |a\(n\)|\.\.|,,| [,.;:]|None", text), text
            assert text == text.strip()


@every_task
def test_articles_agree_with_the_next_word(task: str, samples: dict[str, list[dict[str, Any]]]) -> None:
    for row in samples[task]:
        for article, word in re.findall(r"\b(an?) (\w+)", " ".join(map(str, strings(row)))):
            spoken_consonant = word[:3] in ("one", "use")
            vowel = word == "hour" or (word[0].lower() in "aeiou" and not spoken_consonant)
            assert (article == "an") == vowel, row


@every_task
@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 120), seed=st.integers(0, 2**32))
def test_same_arguments_give_the_same_rows(task: str, n: int, seed: int) -> None:
    generator = TASKS[task][0]
    random.seed(0)
    first = generator(n, seed)
    random.seed(1)
    assert generator(n, seed) == first
    assert len(first) == n


@every_task
def test_other_seed_gives_another_set(task: str) -> None:
    first, second = ({asked(task, row) for row in TASKS[task][0](500, seed)} for seed in (1, 2))
    assert len(first & second) < 10


@every_task
def test_rows_are_shuffled_across_groups(task: str) -> None:
    generator = TASKS[task][0]
    assert generator(40, 5)[:20] != generator(20, 5)


@every_task
@pytest.mark.parametrize("n", [0, -3, MAX_ROWS + 1])
def test_refuses_a_count_out_of_range(task: str, n: int) -> None:
    with pytest.raises(ValueError, match=rf"{task}: .*{n}"):
        TASKS[task][0](n, 0)


@every_task
def test_largest_count_is_possible(task: str) -> None:
    assert len({asked(task, row) for row in TASKS[task][0](MAX_ROWS, 3)}) == MAX_ROWS


@pytest.mark.parametrize("name", ["reviews", "news", "problems", "abstracts", "exercises"])
def test_resources_hold_only_text(name: str) -> None:
    # YAML reads bare words such as "on" or "no" as truth values.
    assert all(isinstance(leaf, str) for leaf in strings(load_words(f"{name}.yaml")))


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 200), seed=st.integers(0, 1000))
def test_review_classes_are_balanced(n: int, seed: int) -> None:
    positive = sum(row["label"] for row in reviews(n, seed))
    assert positive in (n // 2, n - n // 2)


def test_reviews_have_review_length(all_reviews: list[dict[str, Any]]) -> None:
    lengths = [len(row["sentence"].split()) for row in all_reviews]
    assert min(lengths) >= 5
    assert max(lengths) <= 30


def test_reviews_mix_lower_case_and_sentence_case(samples: dict[str, list[dict[str, Any]]]) -> None:
    upper = sum(row["sentence"][0].isupper() for row in samples["reviews"])
    assert 1000 < upper < 3000


def test_review_word_lists_are_rich() -> None:
    data = load_words("reviews.yaml")
    domains = data["domains"].values()
    keys = ("things", "parts_single", "parts_plural")
    subjects = {word for domain in domains for key in keys for word in domain[key]}
    assert len(subjects) >= 60
    sides = {side: set(data["marks"][side]) for side in ("good", "bad")}
    for side, adjectives in sides.items():
        adjectives.update(word for domain in domains for word in domain[side]["qualities"])
        assert len(adjectives) >= 80
    assert not sides["good"] & sides["bad"]


@pytest.mark.parametrize(
    ("sentence", "label"),
    [
        (r"^(?:not once|never) (?:dull|dreary), this", 1),
        (r"^(?:not once|never) (?:gripping|dazzling), this", 0),
        (r"^despite the (?:awful|poor|weak|dire) ", 1),
        (r"^despite the (?:superb|excellent|brilliant) ", 0),
        (r"anything but (?:awful|poor|weak|dire), and", 1),
        (r"anything but (?:superb|excellent|brilliant), and", 0),
    ],
)
def test_review_label_follows_the_main_clause(sentence: str, label: int, all_reviews: list[dict[str, Any]]) -> None:
    labels = [row["label"] for row in all_reviews if re.search(sentence, row["sentence"].lower())]
    assert labels
    assert set(labels) == {label}


@pytest.mark.parametrize(
    ("raw", "written"),
    [("a(n) awful film", "an awful film"), ("a(n) useless phone", "a useless phone"),
     ("a(n) one-man show", "a one-man show"), ("a(n) uninspired play", "an uninspired play"),
     ("A(n) owl", "A(n) owl"), ("what a(n) user-friendly app", "what a user-friendly app")],
)  # fmt: skip
def test_article_follows_the_sound(raw: str, written: str) -> None:
    assert _with_articles(raw) == written


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 200), seed=st.integers(0, 1000))
def test_news_classes_are_balanced(n: int, seed: int) -> None:
    counts = Counter(row["label"] for row in news(n, seed))
    assert set(counts) <= set(LABELS)
    sizes = [counts[label] for label in LABELS]
    assert max(sizes) - min(sizes) <= 1


def test_news_items_have_news_length() -> None:
    lengths = [len(row["text"].split()) for row in news(MAX_ROWS, 6)]
    assert min(lengths) >= 15
    assert max(lengths) <= 45


@pytest.mark.parametrize(
    ("word", "least"), [("stadium", 2), ("Kites", 3), ("football", 2), ("Electronics", 3), ("satellite", 2)]
)
def test_news_classes_share_vocabulary(word: str, least: int, samples: dict[str, list[dict[str, Any]]]) -> None:
    classes = {row["label"] for row in samples["news"] if word in row["text"]}
    assert len(classes) >= least


def test_problem_rationales_are_correct(samples: dict[str, list[dict[str, Any]]]) -> None:
    for row in samples["word_problems"]:
        steps = equations(row["answer"])
        for a, symbol, b, result in steps:
            computed = {"+": a + b, "-": a - b, "*": a * b, "/": a / b if symbol == "/" else 0}[symbol]
            assert computed == result
            assert 0 <= result <= MAX_RESULT
        assert row["answer"].splitlines()[-1] == f"#### {steps[-1][3]}"
        assert len(row["answer"].splitlines()) == len(steps) + 1


def test_problem_numbers_come_from_the_question(samples: dict[str, list[dict[str, Any]]]) -> None:
    for row in samples["word_problems"]:
        stated = Counter(int(number) for number in re.findall(r"\d+", row["question"]))
        known = set(stated) | {
            number for number, words in IN_WORDS.items() if any(word in row["question"] for word in words)
        }
        used: set[int] = set()
        for a, _, b, result in equations(row["answer"]):
            assert {a, b} <= known, row
            used |= {a, b}
            known.add(result)
        assert set(stated) <= used, row


def test_second_step_uses_the_first(samples: dict[str, list[dict[str, Any]]]) -> None:
    for row in samples["word_problems"]:
        steps = equations(row["answer"])
        if len(steps) == 2:
            assert steps[0][3] in (steps[1][0], steps[1][2])


@pytest.mark.parametrize("n", [1, 7, 100])
def test_half_of_the_problems_have_two_steps(n: int) -> None:
    counts = Counter(len(equations(row["answer"])) for row in word_problems(n, 2))
    assert counts[1] == n // 2
    assert counts[2] == n - n // 2


def test_there_are_enough_scenarios() -> None:
    shapes = load_words("problems.yaml")["shapes"]
    assert len(shapes["one_step"]) + len(shapes["two_step"]) >= 16


def test_problem_nouns_agree_with_their_numbers(samples: dict[str, list[dict[str, Any]]]) -> None:
    text = " ".join(row["question"] + " " + row["answer"] for row in samples["word_problems"])
    assert re.search(r"= 1 \w+", text)
    assert not re.search(r"= 1 (?:dollars|pages|years|boxes|pieces|bags|cans|marbles)\b", text)
    assert not re.search(r"= \d\d+ (?:dollar|page|year|box|piece|bag|can|marble)\b", text)


@pytest.mark.parametrize("n", [1, 8, 99])
def test_decisions_are_balanced(n: int) -> None:
    counts = Counter(row["final_decision"] for row in abstracts(n, 3))
    sizes = [counts[label] for label in studies.LABELS]
    assert sum(sizes) == n
    assert max(sizes) - min(sizes) <= 1


def test_decisions_follow_the_numbers(samples: dict[str, list[dict[str, Any]]]) -> None:
    pattern = re.compile(r"was (\d+) points in the test group and (\d+) points in the control group \(p = 0\.(\d\d)")
    found = Counter()
    for row in samples["abstracts"]:
        for test, control, chance in pattern.findall(row["context"]["contexts"][1]):
            significant = chance == "00"
            assert row["final_decision"] == ("yes" if significant and int(test) > int(control) else "no")
            found[significant, row["final_decision"]] += 1
    assert set(found) == {(True, "yes"), (True, "no"), (False, "no")}


def test_question_and_design_do_not_tell_the_decision(samples: dict[str, list[dict[str, Any]]]) -> None:
    domains = load_words("abstracts.yaml")["domains"].values()
    treatments = [treatment for domain in domains for treatment in domain["treatment"]]
    for treatment in treatments:
        rows = [row for row in samples["abstracts"] if treatment in row["question"].lower()]
        assert {row["final_decision"] for row in rows} == set(studies.LABELS), treatment


def test_exercises_have_the_right_answer(samples: dict[str, list[dict[str, Any]]]) -> None:
    for row in samples["exercises"]:
        words, answer = row["input"].split(", "), row["output"].split(", ")
        if "alphabet" in row["instruction"]:
            assert answer == sorted(words)
        elif "small" in row["instruction"] and "number" in row["instruction"]:
            assert sorted(map(int, words)) in (list(map(int, answer)), list(map(int, answer))[::-1])
        elif "capital" in row["instruction"]:
            assert row["output"] == row["input"].upper()
        assert row["output"]


def test_a_word_of_the_exercises_is_in_one_category() -> None:
    words = Counter(word for members in load_words("exercises.yaml")["categories"].values() for word in members)
    assert set(words.values()) == {1}


def test_exercises_are_none_of_the_harmless_instructions() -> None:
    harmless = {prompt.casefold() for prompt in strings(load_words("harmless_instructions.yaml"))}
    assert not harmless & {row["instruction"].casefold() for row in exercises(MAX_ROWS, 8)}


def test_fill_repeats_a_slot_and_separates_numbered_ones() -> None:
    words = {"place": ["north", "south"]}
    first, again, second = fill("{place} {place} {place_2}", words, random.Random(1)).split()
    assert first == again
    assert {first, second} == {"north", "south"}
    assert fill("{place} {name}", words, random.Random(1), {"place": "west", "name": "Ava"}) == "west Ava"


def test_distinct_rows_stop_when_the_draws_repeat() -> None:
    with pytest.raises(ValueError, match="only 1 distinct rows found where 2"):
        distinct_rows(lambda: {"text": "again"}, 2, set(), "text")
