"""Conversations of files: the columns that people use for them, read into turns.

What a row says is read, never guessed: one that says something else is a ``ValueError``. Whoever reads the file adds
where the row stands.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from cwac_lab.core.errors import ConfigError
from cwac_lab.data.cells import is_empty, text, whole
from cwac_lab.models.templates import Turn
from cwac_lab.models.thoughts import without_thoughts

# Names of roles in files, by what they are here.
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model"), "assistant"),
}
# Where the text of a message stands, by where its role stands.
_CONTENT = {"role": "content", "from": "value"}
# What a message may hold that changes what would have to be learned.
_NOT_READ = ("tool_calls", "function_call", "reasoning_content", "thinking")
_SHOWN = 60
# Other tags of thoughts, such as <reason>, are words of answers too.
_THOUGHT = re.compile(r"\s*<think", re.IGNORECASE)


@dataclass(frozen=True)
class Layout:
    """Columns that hold a conversation: either all its messages, or what is asked and what is answered.

    Attributes:
        messages: Column with a list of messages.
        prompt: Column with what is asked: text, or messages.
        response: Column with the answer: text, or messages.
        input: Column with what the prompt is about, where there is one.
        system: Column with a system prompt, where there is one.
    """

    messages: str | None = None
    prompt: str | None = None
    response: str | None = None
    input: str | None = None
    system: str | None = None

    @property
    def wanted(self) -> list[str]:
        """The columns that there have to be."""
        return [column for column in (self.messages, self.prompt, self.response) if column is not None]

    def __str__(self) -> str:
        """Return the columns in words."""
        columns = (self.system, self.messages, self.prompt, self.input, self.response)
        return ", ".join(column for column in columns if column is not None)


LAYOUTS = (
    Layout(messages="messages"),
    Layout(messages="conversations"),
    Layout(prompt="prompt", response="completion"),
    Layout(prompt="prompt", response="response"),
    Layout(prompt="instruction", response="output", input="input"),
    Layout(prompt="question", response="answer"),
)


def layout_of(seen: Collection[str], named: Mapping[str, str]) -> Layout:
    """Return the layout of a file with some columns.

    Args:
        seen: Its columns.
        named: Columns by the fields of ``Layout``, where a user names them.

    Raises:
        ConfigError: If there is none, or a named column is missing.
    """
    if named:
        for name, column in named.items():
            if column not in seen:
                raise ConfigError(f"task.columns.{name}", column, f"a column of the file: {', '.join(seen)}")
        layout = Layout(**named)
        if layout.wanted not in ([layout.messages], [layout.prompt, layout.response]):
            raise ConfigError("task.columns", dict(named), "messages, or prompt and response")
        return layout
    for layout in LAYOUTS:
        if set(layout.wanted) <= set(seen):
            extra = {name: name for name in ("system",) if name in seen}
            given = layout.input if layout.input in seen else None
            return Layout(**{**vars(layout), **extra, "input": given})
    known = " | ".join(str(layout) for layout in LAYOUTS)
    raise ConfigError("task.columns", "none", f"{known}, or other names; the file has {', '.join(seen)}")


def turns_of(cells: Mapping[str, Any], layout: Layout) -> list[Turn]:
    """Return the turns of a row; what stands after the last answer is left out.

    Raises:
        KeyError: If the row lacks a column.
        ValueError: If it is no conversation: system first, if at all, then user and assistant by turns.
    """
    if layout.messages is not None:
        turns = _messages(layout.messages, cells[layout.messages])
    else:
        assert layout.prompt is not None
        assert layout.response is not None
        turns = _side(cells, layout.prompt, "user")
        if layout.input is not None and not is_empty(cells.get(layout.input)):
            *before, (role, asked) = turns
            turns = [*before, Turn(role, f"{asked.rstrip()}\n\nInput: {text(cells, layout.input)}")]
        turns += _side(cells, layout.response, "assistant")
    if layout.system is not None and not is_empty(cells.get(layout.system)):
        turns = [Turn("system", text(cells, layout.system)), *turns]
    return _checked(_without_thoughts(turns))


def _without_thoughts(turns: list[Turn]) -> list[Turn]:
    """Return turns as they are, if no answer begins with thoughts: a template would put the answer behind others."""
    for place, turn in enumerate(turns, 1):
        if turn.role == "assistant" and _THOUGHT.match(turn.text) and without_thoughts(turn.text)[1]:
            raise ValueError(f"turn {place} begins with thoughts ({_cut(turn.text)}): accepted: answers without them")
    return turns


def _side(cells: Mapping[str, Any], column: str, role: str) -> list[Turn]:
    """Return what is asked or answered: a text of that role, or messages."""
    cell = cells[column]
    return _messages(column, cell) if isinstance(cell, list) else [Turn(role, text(cells, column).strip())]


def _messages(column: str, cell: object) -> list[Turn]:
    if not isinstance(cell, list) or not cell:
        raise ValueError(f"{column}={_cut(cell)}: accepted: a list of messages, each with role and content")
    return [_message(f"{column}[{place}]", message) for place, message in enumerate(cell)]


def _message(place: str, message: object) -> Turn:
    given = {key: value for key, value in message.items() if value is not None} if isinstance(message, dict) else {}
    role = next((key for key in _CONTENT if key in given), None)
    if role is None:
        raise ValueError(f"{place}={_cut(message)}: accepted: a message with role and content, or from and value")
    named, content = given[role], _CONTENT[role]
    if not isinstance(named, str) or named not in ROLES:
        raise ValueError(f"{place}.{role}={_cut(named)}: accepted: {' | '.join(ROLES)}")
    for key in _NOT_READ:
        if given.get(key):
            raise ValueError(f"{place}.{key}: accepted: messages of text only")
    if given.get("weight", 1) != 1:
        raise ValueError(f"{place}.weight={given['weight']}: accepted: 1, as every answer is learned alike")
    said = _content(f"{place}.{content}", given.get(content))
    return Turn(ROLES[named], said.strip())


def _content(place: str, content: object) -> str:
    """Return the text of a message, which may be a list of parts."""
    if isinstance(content, list):
        for number, part in enumerate(content):
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise ValueError(f"{place}[{number}]={_cut(part)}: accepted: a part with type=text and a text")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str) or is_empty(content):
        raise ValueError(f"{place}={_cut(content)}: accepted: text that is not empty")
    return whole(place, content)


def _checked(turns: list[Turn]) -> list[Turn]:
    answers = [place for place, turn in enumerate(turns) if turn.role == "assistant"]
    if not answers:
        raise ValueError("no turn of the assistant: accepted: a conversation with an answer")
    turns = turns[: answers[-1] + 1]
    spoken = turns[1:] if turns[0].role == "system" else turns
    for place, turn in enumerate(spoken):
        wanted = ("user", "assistant")[place % 2]
        if turn.role != wanted:
            number = place + 1 + len(turns) - len(spoken)
            raise ValueError(
                f"turn {number} is of the {turn.role}: accepted: {wanted}, as user and assistant take turns"
            )
    return turns


def _cut(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
