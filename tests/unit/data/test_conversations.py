"""What rows of conversations people have become turns, and what is no conversation is one line."""

from __future__ import annotations

import pytest

from cwac_lab.core.errors import ConfigError
from cwac_lab.data.conversations import Layout, layout_of, turns_of

S, U, A = "system", "user", "assistant"
ASKED = [{"role": U, "content": "Hi"}]
SAID = {"role": A, "content": "Hello!"}


@pytest.mark.parametrize(
    ("cells", "turns"),
    [
        ({"messages": [*ASKED, SAID]}, [(U, "Hi"), (A, "Hello!")]),
        ({"messages": [{"role": "developer", "content": "Be brief."}, *ASKED, SAID]},
         [(S, "Be brief."), (U, "Hi"), (A, "Hello!")]),
        ({"messages": [*ASKED, SAID, *ASKED]}, [(U, "Hi"), (A, "Hello!")]),
        ({"messages": [*ASKED, SAID, *ASKED, SAID], "id": 3}, [(U, "Hi"), (A, "Hello!")] * 2),
        ({"messages": [{"role": U, "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}, SAID]},
         [(U, "Hi"), (A, "Hello!")]),
        ({"messages": [{"role": U, "content": "Hi", "name": None, "tool_calls": None}, SAID]},
         [(U, "Hi"), (A, "Hello!")]),
        ({"messages": [*ASKED, SAID], "system": "Be brief."}, [(S, "Be brief."), (U, "Hi"), (A, "Hello!")]),
        ({"messages": [*ASKED, {**SAID, "weight": 1}]}, [(U, "Hi"), (A, "Hello!")]),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": " Hello!\n"}]},
         [(U, "Hi"), (A, "Hello!")]),
        ({"prompt": "Hi", "completion": "Hello!"}, [(U, "Hi"), (A, "Hello!")]),
        ({"prompt": ASKED, "completion": [SAID]}, [(U, "Hi"), (A, "Hello!")]),
        ({"prompt": "Hi", "response": "Hello!", "system": "Be brief."}, [(S, "Be brief."), (U, "Hi"), (A, "Hello!")]),
        ({"prompt": "Hi", "response": "Hello!", "system": ""}, [(U, "Hi"), (A, "Hello!")]),
        ({"instruction": "Add.", "input": "1, 2", "output": "3"}, [(U, "Add.\n\nInput: 1, 2"), (A, "3")]),
        ({"instruction": "Add.", "input": "", "output": 3}, [(U, "Add."), (A, "3")]),
        ({"instruction": "Add.", "output": "3"}, [(U, "Add."), (A, "3")]),
        ({"question": "Hi", "answer": "Hello!"}, [(U, "Hi"), (A, "Hello!")]),
    ],
)  # fmt: skip
def test_the_turns_of_a_row(cells, turns):
    assert turns_of(cells, layout_of(cells.keys(), {})) == turns


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], r"messages=\[\]: accepted: a list"),
        ("Hi", "messages='Hi': accepted: a list"),
        (["Hi"], r"messages\[0\]='Hi': accepted: a message"),
        ([{"role": "tool", "content": "3"}], r"messages\[0\].role='tool': accepted: system | developer"),
        ([{"role": U, "content": "Hi", "tool_calls": [{}]}, SAID], r"messages\[0\].tool_calls: accepted"),
        ([{"role": U, "content": ""}, SAID], r"messages\[0\].content='': accepted: text that is not empty"),
        ([{"role": U, "content": None}, SAID], r"messages\[0\].content=None"),
        (
            [{"role": U, "content": [{"type": "image", "url": "x"}]}, SAID],
            r"content\[0\]=.*accepted: a part with type=text",
        ),
        ([*ASKED, {**SAID, "weight": 0}], r"messages\[1\].weight=0: accepted: 1"),
        ([*ASKED, {**SAID, "reasoning_content": "well"}], r"messages\[1\].reasoning_content: accepted"),
        ([{"role": ["x"], "content": "Hi"}, SAID], r"messages\[0\].role=\['x'\]: accepted"),
        ([{"role": U, "content": "\ud800"}, SAID], "half of a character"),
        (ASKED, "no turn of the assistant"),
        ([*ASKED, *ASKED, SAID], "turn 2 is of the user: accepted: assistant"),
        ([{"role": S, "content": "Be brief."}, SAID], "turn 2 is of the assistant: accepted: user"),
        ([SAID, *ASKED, SAID], "turn 1 is of the assistant: accepted: user"),
        ([*ASKED, SAID, {"role": S, "content": "x"}, SAID], "turn 3 is of the system: accepted: user"),
    ],
)
def test_what_is_no_conversation_says_why(messages, words):
    with pytest.raises(ValueError, match=words):
        turns_of({"messages": messages}, Layout(messages="messages"))


def test_columns_of_other_names():
    layout = layout_of(("frage", "antwort"), {"prompt": "frage", "response": "antwort"})
    assert turns_of({"frage": "Hi", "antwort": "Hello!"}, layout) == [(U, "Hi"), (A, "Hello!")]


@pytest.mark.parametrize(
    ("seen", "named", "words"),
    [
        (("text",), {}, r"task.columns=none: accepted: messages \| conversations \| prompt, completion .*has text"),
        (("a", "b"), {"prompt": "a", "response": "c"}, "task.columns.response=c: accepted: a column of the file: a, b"),
        (("a", "b"), {"prompt": "a"}, "task.columns=.*accepted: messages, or prompt and response"),
        (
            ("a", "b", "c"),
            {"messages": "a", "prompt": "b"},
            "task.columns=.*accepted: messages, or prompt and response",
        ),
    ],
)
def test_columns_that_hold_no_conversation(seen, named, words):
    with pytest.raises(ConfigError, match=words):
        layout_of(seen, named)
