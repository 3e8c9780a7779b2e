"""Chat templates as they come: how a conversation is handed to one, and what must not depend on the day.

A template is tried with a question and an answer before anything is asked of a model. Most take content as text; some
take a list of parts, or want a message of the system first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from jinja2 import TemplateError

from cwac_lab.core.errors import ConfigError

Message = dict[str, Any]
# Returns the text of a conversation: with what opens the answer (True), or as it stands (False).
Render = Callable[[list[Message], bool], str]


class Turn(NamedTuple):
    """One turn of a conversation: ``system``, ``user`` or ``assistant``, and what is said."""

    role: str
    text: str


QUESTION, ANSWER = "Which way leads to the lake?", "Along the river bank."
ASKED = (Turn("user", QUESTION),)
# The day that templates are told, whatever the day is: the one that Llama 3.1's falls back to.
DAY = datetime(2024, 7, 26)


# What templates may ask for beside the messages. Thoughts are off where a template knows a switch for them.
VARIABLES: dict[str, Any] = {"date_string": DAY.strftime("%d %b %Y"), "enable_thinking": False, "thinking": False}
_DIRECTIVES = [f"%{directive}" for directive in "aAwdbBmyYHIpMSfjUWcxXzZeFTDR"]
_DATES = {directive: DAY.strftime(directive) for directive in _DIRECTIVES} | {
    "%-d": str(DAY.day),
    "%-m": str(DAY.month),
}
# Put before a template that asks for the time, this takes the place of transformers' function of the name. The line
# break is the block's own: Jinja leaves it out.
_CLOCK = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace('{directive}', '{text}')" for directive, text in _DATES.items())
    + " }}{% endmacro %}\n"
)


def on_the_day(template: str) -> str:
    """Return a template in which ``strftime_now`` tells the time on ``DAY``, at midnight."""
    return _CLOCK + template if "strftime_now" in template else template


# What a template can raise: Jinja's own errors, and Python's for an operation on a wrong type.
_ERRORS = (TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError)


@dataclass(frozen=True)
class Shape:
    """How a conversation is handed to a template.

    Attributes:
        system: Content of a first message of the system; None for no such message.
        parts: Whether content is a list of parts, as multimodal templates want it.
    """

    system: str | None = None
    parts: bool = False

    def messages(self, turns: Sequence[Turn]) -> list[Message]:
        """Return a conversation as a template takes it, with a message of the system where it wants one."""
        if self.system is not None and turns[0].role != "system":
            turns = [Turn("system", self.system), *turns]
        return [{"role": role, "content": self._content(text)} for role, text in turns]

    def _content(self, text: str) -> str | list[dict[str, str]]:
        return [{"type": "text", "text": text}] if self.parts else text


# The first that a template renders right is used.
SHAPES = tuple(Shape(system, parts) for parts in (False, True) for system in (None, "", "You are a helpful assistant."))


def shape_of(render: Render, key: str, template: str, *, answers: bool = True) -> Shape:
    """Return the shape in which a template shows a prompt and, unless told otherwise, the answer after it.

    Args:
        render: Renders messages by the template.
        key: Setting that holds the template, or could hold another one.
        template: The template.
        answers: Whether the template has to show answers.

    Raises:
        ConfigError: If there is none; with the template's own words where it raised.
    """
    why = ""
    for shape in SHAPES:
        try:
            asked = render(shape.messages(ASKED), True)
            full = render(shape.messages([*ASKED, Turn("assistant", ANSWER)]), False) if answers else asked + ANSWER
        except _ERRORS as error:
            found = f"a Jinja chat template ({' '.join(str(error).split()) or type(error).__name__})"
        else:
            found = _missing(asked, full)
            if not found:
                return shape
        why = why or found  # of the plainest shape
    raise ConfigError(key, shortened(template), why)


def shows_system(render: Render, shape: Shape) -> bool:
    """Tell whether a template shows a system prompt and the prompt after it; some raise, some show one of the two."""
    try:
        text = render(shape.messages([Turn("system", ANSWER), *ASKED]), True)
    except _ERRORS:
        return False
    return ANSWER in text and QUESTION in text


def _missing(asked: str, full: str) -> str:
    """Return what a rendered prompt and conversation lack, as what would be accepted; "" where they lack nothing."""
    if QUESTION not in asked or QUESTION not in full:
        return "a chat template that asks the prompt, {{ messages[0]['content'] }}"
    if "'type': 'text'" in asked + full:
        return "a chat template that takes content as text, or as a list of parts with a type and a text"
    if ANSWER not in full.rpartition(QUESTION)[2]:
        return "a chat template that shows the answer after the prompt, {{ messages[1]['content'] }}"
    return ""


def check_template(key: str, template: str | None, *, answers: bool = False) -> None:
    """Raise ``ConfigError`` unless a chat template, where there is one, shows the prompt (and an answer, if asked)."""
    if template is None:
        return
    from transformers.utils.chat_template_utils import render_jinja_template

    def render(messages: list[Message], opens: bool) -> str:
        (text,), _ = render_jinja_template(
            [messages], chat_template=on_the_day(template), add_generation_prompt=opens,
            bos_token="<s>", eos_token="</s>", **VARIABLES,
        )  # fmt: skip
        return str(text)

    shape_of(render, key, template, answers=answers)


def shortened(text: str) -> str:
    """Return a text on one line, without its middle where it is long."""
    line = " ".join(text.split())
    return line if len(line) <= 120 else f"{line[:80]} ... {line[-30:]}"
