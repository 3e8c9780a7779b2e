"""Conversations of several turns through the templates of known models."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cwac_lab.models.chat import IGNORED, ChatFormat
from cwac_lab.models.templates import Turn
from support import families
from support.families import FAMILIES

SYSTEM = Turn("system", "Be brief and plain")
FIRST, SAID = Turn("user", "two and two?"), Turn("assistant", "it is four")
AGAIN, LAST = Turn("user", "and one more?"), Turn("assistant", "then it is five")
LONG = [FIRST, SAID, AGAIN, LAST]


def made(name, max_length=512):
    return ChatFormat(families.tokenizer(FAMILIES[name]), max_length)


def several(name):
    """Tell whether a template shows more than one exchange."""
    return AGAIN.text in made(name).tokenizer.decode(made(name).prompt_ids(LONG[:3]))


def spans(example):
    """Return each run of tokens that is learned, with all that stands before it."""
    found, begin = [], None
    for place, label in enumerate([*example.labels, IGNORED]):
        if label != IGNORED and begin is None:
            begin = place
        elif label == IGNORED and begin is not None:
            found.append((example.input_ids[:begin], example.labels[begin:place]))
            begin = None
    return found


@pytest.mark.parametrize("name", filter(several, FAMILIES))
@pytest.mark.parametrize("system", [(), (SYSTEM,)], ids=["plain", "system"])
def test_every_answer_is_taught_behind_what_generation_starts_from(name, system):
    """No begin is doubled, each answer ends, and what is learned is the answers and their ends alone."""
    chat, family = made(name), FAMILIES[name]
    turns = [*system, *LONG]
    end, begin = (chat.tokenizer.convert_tokens_to_ids(token) if token else None for token in (family.end, family.bos))
    examples = chat.encode_every(turns)
    for row in examples:
        assert all(label in (IGNORED, token) for token, label in zip(row.input_ids, row.labels, strict=True))
    found = [span for example in examples for span in spans(example)]
    assert [chat.decode(taught) for _, taught in found] == [SAID.text, LAST.text]
    for place, (head, taught) in zip((1, 3), found, strict=True):
        assert head == chat.prompt_ids(turns[: place + len(system)])
        assert taught[-1] == end
        assert taught.count(end) == 1
        if family.begins and begin != end and name != "llama2":  # which begins every exchange
            assert head.count(begin) == 1


def test_a_template_that_shows_what_was_said_as_it_was_gives_one_example():
    assert [len(made(name).encode_every(LONG)) for name in ("smollm2", "llama3", "gemma2", "phi3")] == [1] * 4


@pytest.mark.parametrize("name", FAMILIES)
def test_a_system_prompt_is_shown_by_every_template(name):
    chat = made(name)
    text = chat.tokenizer.decode(chat.prompt_ids([SYSTEM, FIRST]))
    assert SYSTEM.text in text
    assert FIRST.text in text.partition(SYSTEM.text)[2]
    if not chat.takes_system:
        assert chat.prompt_ids([SYSTEM, FIRST]) == chat.prompt_ids(f"{SYSTEM.text}\n\n{FIRST.text}")


def test_of_a_conversation_that_is_too_long_the_oldest_exchanges_go_and_the_answer_stays():
    whole = made("smollm2").encode([SYSTEM, *LONG[:3]], LAST.text)
    chat = made("smollm2", len(whole.input_ids) - 1)
    cut = chat.encode([SYSTEM, *LONG[:3]], LAST.text)
    assert cut == replace(chat.encode([SYSTEM, AGAIN], LAST.text), cut=True)
    assert chat.prompt_ids([SYSTEM, *LONG[:3]]) == made("smollm2").prompt_ids([SYSTEM, *LONG[:3]])
    every = chat.encode_every([SYSTEM, *LONG])
    assert every == [replace(chat.encode([SYSTEM, AGAIN], LAST.text), cut=True)]


@pytest.mark.parametrize("name", ["smollm2", "gemma2"])
def test_a_system_prompt_stays_where_exchanges_are_cut(name):
    asked = [SYSTEM, Turn("user", "word " * 40 + "end"), SAID, AGAIN]
    chat = made(name, len(made(name).prompt_ids(asked)) - 1)
    assert chat.prompt_ids(asked) == made(name).prompt_ids([SYSTEM, AGAIN])
    (row,) = made(name, len(made(name).encode(asked, LAST.text).input_ids) - 1).encode_every([*asked, LAST])
    assert SYSTEM.text in chat.tokenizer.decode(row.input_ids)


@cache
def unlimited(name, prefixed):
    return ChatFormat(families.tokenizer(FAMILIES[name], prefixed=prefixed), 4096)


# How many words are asked and answered in each exchange.
SIZES = st.lists(st.tuples(st.integers(0, 25), st.integers(0, 12)), min_size=2, max_size=4)


@pytest.mark.parametrize("name", filter(several, FAMILIES))
@settings(max_examples=8, deadline=None)
@given(sizes=SIZES, system=st.sampled_from([[], [SYSTEM]]), share=st.floats(0, 1), prefixed=st.booleans())
def test_what_a_cut_leaves_is_taught_once_and_as_generation_would_start(name, sizes, system, share, prefixed):
    """Each example begins with a prompt, as if nothing had been said before it; only the oldest exchanges go."""
    whole = unlimited(name, prefixed)
    words = [
        (f"question {n}" + " more" * asked, f"answer {n}" + " yes" * given) for n, (asked, given) in enumerate(sizes)
    ]
    said = [turn for asked, given in words for turn in (Turn("user", asked), Turn("assistant", given))]
    begins, ends = range(0, len(said), 2), range(1, len(said), 2)

    def length(begin, end):
        return len(whole.encode([*system, *said[begin:end]], said[end].text).input_ids)

    least, most = max(map(length, begins, ends)), length(0, ends[-1])
    # A template with a long system message of its own takes more without one than with a short one.
    limit = max(least + round(share * (most - least)), sum(whole._frame(())) + 1)
    taught = []
    for example in ChatFormat(whole.tokenizer, limit).encode_every([*system, *said]):
        assert len(example.input_ids) <= limit
        begun = set()
        for head, answer in spans(example):
            end = said.index(Turn("assistant", whole.decode(answer)))
            heads = [whole.prompt_ids([*system, *said[begin:end]]) for begin in begins if begin < end]
            begun.add(begins[heads.index(head)])
            taught.append(end)
        (begin,) = begun
        assert example.cut is (begin > 0)
    assert begin == 0 or length(begin - 2, ends[-1]) > limit  # no more goes than has to
    alone = len(whole.encode_every([*system, *said])) == len(ends)
    assert taught == [end for end in ends if alone or end > begin]


def test_templates_of_both_kinds_are_tried():
    assert {len(made(name).encode_every(LONG)) for name in filter(several, FAMILIES)} == {1, 2}


def test_one_exchange_that_is_too_long_loses_words_of_the_user_and_no_system_prompt():
    chat = made("smollm2")
    asked = [SYSTEM, Turn("user", "word " * 60 + "at the end")]
    short = made("smollm2", len(chat.encode(asked, LAST.text).input_ids) - 40)
    row = short.encode(asked, LAST.text)
    text = short.tokenizer.decode(row.input_ids)
    assert len(row.input_ids) == short.max_length
    assert row.cut
    assert SYSTEM.text in text
    assert "at the end" in text
    assert short.decode([label for label in row.labels if label != IGNORED]) == LAST.text
    assert short.encode_every([*asked, LAST]) == [row]


def test_a_greeting_before_the_only_prompt_is_cut_like_any_other():
    chat = made("smollm2")
    asked = [SYSTEM, Turn("assistant", "Hello!"), Turn("user", "word " * 60 + "at the end")]
    short = made("smollm2", len(chat.encode(asked, LAST.text).input_ids) - 40)
    (row,) = short.encode_every([*asked, LAST])
    assert row == short.encode(asked, LAST.text)
    assert len(row.input_ids) == short.max_length


def test_a_template_that_shows_one_exchange_only_does_not_show_a_conversation():
    chat = made("smollm2")
    assert chat.shows([SYSTEM, *LONG[:3]])
    single = chat.with_template("user {{ messages[0]['content'] }} assistant")
    assert not single.shows(LONG[:3])
    assert single.shows([FIRST])
    assert single.prompt_ids([SYSTEM, FIRST]) == single.prompt_ids(f"{SYSTEM.text}\n\n{FIRST.text}")
