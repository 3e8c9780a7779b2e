"""One chat format for training and evaluation: the model's own template, with exact prompt/response boundaries.

A template is taken as it comes and checked once, with a question and an answer of its own. What it leaves open is
closed here, so that the ids that training sees before an answer are those that generation starts from, and that an end
is taught; ``ChatFormat.remarks`` tells what was.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cwac_lab.core.errors import ConfigError, MissingAsset
from cwac_lab.models.templates import (
    ANSWER,
    ASKED,
    QUESTION,
    VARIABLES,
    Message,
    Shape,
    Turn,
    on_the_day,
    shape_of,
    shows_system,
)
from cwac_lab.models.thoughts import closing_of, without_thoughts

IGNORED = -100
_KEY = "model.chat_template"
# What a model is asked: one prompt, or a conversation that ends with one.
Prompt = str | Sequence[Turn]


@dataclass(frozen=True)
class Encoded:
    """Token ids of one conversation; ``labels`` are ``IGNORED`` on the prompt. Both lists have length T.

    ``cut`` tells that it was longer than the limit.
    """

    input_ids: list[int]
    labels: list[int]
    cut: bool = False


class ChatFormat:
    """Renders prompts and responses through a tokenizer's chat template.

    Attributes:
        tokenizer: The tokenizer.
        max_length: Longest conversation, in tokens.
        end_id: What ends an answer: the special token with which the template closes it, or the tokenizer's end.
        pad_id: Id to pad with.
        remarks: What was done about a template that leaves something open, in words.
    """

    def __init__(self, tokenizer: Any, max_length: int = 512) -> None:
        """Wrap a tokenizer; conversations are cut to ``max_length`` tokens.

        Raises:
            ConfigError: If its template shows no prompts or answers, or raises, or takes more than ``max_length``.
            MissingAsset: If neither template nor tokenizer has an end.
        """
        self.tokenizer, self.max_length = tokenizer, max_length
        self.remarks: list[str] = []
        # Control tokens of a template need not be among the tokenizer's named special tokens (Gemma's base models).
        self._control = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._read(answers=True)
        self.end_id: int = self._end_of_turn()
        # What ends a turn is one even where the tokenizer does not call it special.
        self._control.setdefault(self.end_id, str(tokenizer.convert_ids_to_tokens(self.end_id)))
        self.pad_id: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.end_id

    def _read(self, *, answers: bool) -> None:
        """Find out how the template takes conversations, what it puts around a prompt, and what after an answer."""
        template = self.tokenizer.chat_template or ""
        if isinstance(template, dict):
            if "default" not in template:
                names = " | ".join(sorted(template))
                raise ConfigError(_KEY, names, "the text of one of these templates, as none of them is called default")
            template = template["default"]
        self._template = on_the_day(template)
        self._shape: Shape = shape_of(self._apply, _KEY, template, answers=answers)
        self.takes_system = shows_system(self._apply, self._shape)
        asked, full = self._render(ASKED, None), self._render(ASKED, ANSWER) if answers else ""
        before, _, self._after = full.rpartition(ANSWER)
        self._lead = self._leading(asked, before)
        least = sum(self._frame(()))
        if least >= self.max_length:
            accepted = f"> {least}, the tokens that the chat template itself takes"
            raise ConfigError("trainer.max_length", self.max_length, accepted)
        if self._shape.system is not None:
            self.remarks.append(f"the chat template wants a system message: it is given {self._shape.system!r}")

    def _leading(self, asked: str, before: str) -> str:
        """Return what a prompt has to end with beside what the template asks, for an answer to come next.

        It is what the template puts before an answer in training, such as an empty block of thoughts. White space alone
        is the answer's: tokenizers join it to the first word. A block that the template opens is closed.
        """
        gap = before[len(asked) :] if before.startswith(asked) else ""
        gap = gap.rstrip(" ") if gap.strip() else ""
        lead = gap + closing_of((asked + gap).rpartition(QUESTION)[2])
        if lead:
            self.remarks.append(
                f"prompts end with {lead!r} beside what the chat template asks, so that an answer is next"
            )
        elif before and not before.startswith(asked):
            self.remarks.append("the chat template asks otherwise than it shows answers: they are taught as it asks")
        return lead

    def _end_of_turn(self) -> int:
        """Return the special token with which the template closes an answer (EOS where it has none of its own)."""
        added = self.tokenizer.added_tokens_decoder  # line breaks are among them in some tokenizers
        after = [i for i in self.tokens(self._after) if i in added and self.tokenizer.decode([i]).strip()]
        # Some tokenizers do not call the token special that their template ends turns with.
        special = [i for i in after if i in self._control] or after
        if special:
            self._after = ""  # what stands before the end is part of the turn
            return special[0]
        if self.tokenizer.eos_token_id is None:
            raise MissingAsset(
                "the chat template closes an answer with no special token, and the tokenizer has no end (eos_token): "
                f"nothing would end an answer; accepted: {_KEY} with an end, or a tokenizer with one"
            )
        end = int(self.tokenizer.eos_token_id)
        self.remarks.append(
            f"the chat template ends no answer: the tokenizer's {self.tokenizer.eos_token} is taught to end it"
        )
        return end

    def _apply(self, messages: list[Message], opens: bool) -> str:
        text = self.tokenizer.apply_chat_template(
            messages, chat_template=self._template, tokenize=False, add_generation_prompt=opens, **VARIABLES
        )
        return str(text)

    def _render(self, turns: Sequence[Turn], response: str | None) -> str:
        told = turns if response is None else [*turns, Turn("assistant", response)]
        return self._apply(self._shape.messages(told), response is None)

    def _head(self, turns: Sequence[Turn]) -> str:
        return self._render(turns, None) + self._lead

    def _frame(self, system: Sequence[Turn]) -> tuple[int, int]:
        """Return how many tokens a template puts before and after the words of a prompt, behind a system prompt."""
        alike = [self.tokens(self._head([*system, Turn("user", text)])) for text in (QUESTION, ANSWER)]
        return _shared(*alike), _shared(*(ids[::-1] for ids in alike))

    def turns(self, prompt: Prompt) -> list[Turn]:
        """Return a prompt as turns that the template shows: without a system role its words come before the first."""
        told = _as_turns(prompt)
        if told[0].role == "system" and not self.takes_system:
            return [Turn("user", f"{told[0].text}\n\n{told[1].text}"), *told[2:]]
        return told

    def with_template(self, template: str | None) -> ChatFormat:
        """Return a format that renders by another template; what begins prompts and ends answers is as in this one.

        None stands for the template of this one.

        Raises:
            ConfigError: If the template shows no prompts, or raises.
        """
        if template is None:
            return self
        changed = copy.copy(self)
        changed.remarks, changed.tokenizer = [], copy.deepcopy(self.tokenizer)
        changed.tokenizer.chat_template = template
        changed._read(answers=False)
        begin = self.tokenizer.bos_token
        if begin and self._head(ASKED).startswith(begin) and not changed._head(ASKED).startswith(begin):
            changed.tokenizer.chat_template = begin + template
            changed._read(answers=False)
        return changed

    def tokens(self, text: str) -> list[int]:
        """Return the ids of a text as it stands, without special tokens of the tokenizer's own."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def shows(self, turns: Sequence[Turn]) -> bool:
        """Tell whether the template shows what the system and users say in a conversation, in this order."""
        text, at = self._head(self.turns(turns)), 0
        for turn in turns:
            if turn.role != "assistant":  # whose earlier thoughts some templates leave out
                at = text.find(turn.text.strip(), at)
                if at < 0:
                    return False
                at += len(turn.text.strip())
        return True

    def control_in(self, text: str) -> str | None:
        """Return a control token that stands in a text, which would be one and no words; None where there is none."""
        return next((token for token in self._control.values() if token.strip() and token in text), None)

    def ends(self, others: Iterable[int]) -> list[int]:
        """Return the ids that end an answer: the end of turn first, then the tokenizer's and those of others.

        Of others those are left out that are words to the tokenizer: a config may name an end of another one.
        """
        known = {token for token in (self.tokenizer.eos_token_id, *others) if token in self._control}
        return [self.end_id, *sorted(known - {self.end_id})]

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Return the ids after which the model's answer starts (template with generation prompt), cut to the limit.

        Of a conversation the oldest exchanges are left out first, never the system prompt.
        """
        told = _as_turns(prompt)
        ids = self.tokens(self._head(self.turns(told)))
        while len(ids) > self.max_length and (fewer := _without_first(told)) != told:
            told = fewer
            ids = self.tokens(self._head(self.turns(told)))
        return self._fitted(ids, self.max_length, self.turns(told))

    def n_cut(self, prompts: Iterable[Prompt]) -> int:
        """Return how many prompts are longer than the limit, so that ``prompt_ids`` cuts them."""
        return sum(len(self.tokens(self._head(self.turns(prompt)))) > self.max_length for prompt in prompts)

    def told_cut(self, cut: int, of: int, what: str, more: str = "") -> Iterator[str]:
        """Yield a line that tells how many of so many prompts or rows are cut, where any are."""
        if cut:
            limit = f"trainer.max_length={self.max_length} tokens"
            yield f"{cut} of {of} {what} are longer than {limit}: their prompts are cut from the left{more}"

    def _fitted(self, ids: list[int], room: int, turns: Sequence[Turn]) -> list[int]:
        """Return a prompt's ids cut to ``room``: the user's words from the left, and the template's if it must be."""
        if len(ids) <= room:
            return ids
        opening, closing = self._frame([turn for turn in turns[:1] if turn.role == "system"])
        keep = opening if room > opening + closing else 0
        return ids[:keep] + ids[keep + len(ids) - room :]

    def encode(self, prompt: Prompt, response: str) -> Encoded:
        """Return a training example: loss on the response and its end-of-turn token only.

        The prompt's tokens are those seen at generation. Of a conversation that is too long the oldest exchanges are
        left out, never the answer; one prompt that leaves no room is cut from the left, behind the template's opening,
        and a response that alone is too long from the right.
        """
        told = _as_turns(prompt)
        prompt_ids, answer = self._parts(self.turns(told), response)
        cut = len(prompt_ids) + len(answer) > self.max_length
        while len(prompt_ids) + len(answer) > self.max_length and (fewer := _without_first(told)) != told:
            told = fewer
            prompt_ids, answer = self._parts(self.turns(told), response)
        answer = answer[: self.max_length - 1]
        prompt_ids = self._fitted(prompt_ids, self.max_length - len(answer), self.turns(told))
        return Encoded(prompt_ids + answer, [IGNORED] * len(prompt_ids) + answer, cut)

    def encode_every(self, turns: Sequence[Turn]) -> list[Encoded]:
        """Return training examples of a conversation: loss on every answer of the assistant and its end of turn.

        It is one example where the template shows what was said as it was said. Where it shows earlier turns in another
        way than it asked for them, e.g. without their thoughts, each answer that is shown so is an example of its own.
        What is too long loses its oldest exchanges, and with them the answers that no other example has.
        """
        told = list(turns)
        cut = False
        while True:
            examples = self._every(self.turns(told), cut)
            if max(len(example.input_ids) for example in examples) <= self.max_length:
                return examples
            answers = [place for place, turn in enumerate(told) if turn.role == "assistant"]
            if len(examples) == len(answers):  # of one answer each: what one of them loses, the others keep
                alone = (self.encode(told[:place], told[place].text) for place in answers)
                return [replace(example, cut=cut or example.cut) for example in alone]
            fewer, cut = _without_first(told), True
            if fewer == told:
                return [self.encode(told[:-1], told[-1].text)]
            told = fewer

    def _every(self, turns: Sequence[Turn], cut: bool) -> list[Encoded]:
        found: list[Encoded] = []
        ids: list[int] = []
        labels: list[int] = []
        for place, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            head, answer = self._parts(turns[:place], turn.text)
            if head[: len(ids)] != ids:  # the template shows what came before otherwise than it was taught
                found.append(Encoded(ids, labels, cut))
                ids, labels = [], []
            labels = labels + [IGNORED] * (len(head) - len(ids)) + answer
            ids = head + answer
        return [*found, Encoded(ids, labels, cut)]

    def _parts(self, turns: Sequence[Turn], response: str) -> tuple[list[int], list[int]]:
        """Return the ids of what is asked, and those of the response with its end."""
        head, full = self._head(turns), self._render(turns, response)
        # A template that strips or rewrites the answer (e.g. Llama 2's spaces) still ends the turn.
        tail = full[len(head) :].removesuffix(self._after) if full.startswith(head) else response
        prompt_ids, whole = self.tokens(head), self.tokens(head + tail)
        # Apart from its prompt the first word of an answer would be another token to some tokenizers (Llama 2's).
        together = whole[: len(prompt_ids)] == prompt_ids
        answer = whole[len(prompt_ids) :] if together else self.tokens(tail)
        answer = answer[: answer.index(self.end_id)] if self.end_id in answer else answer
        return prompt_ids, [*answer, self.end_id]

    def encode_own(self, prompt: Prompt, answer: str, *, ended: bool) -> Encoded:
        """Return an answer that a model gave as a training example.

        One that the limit of tokens cut off is given no end of turn, or the model would learn to stop midway.
        """
        encoded = self.encode(prompt, answer)
        return encoded if ended else Encoded(encoded.input_ids[:-1], encoded.labels[:-1], encoded.cut)

    def spoken(self, ids: Sequence[int]) -> tuple[str, bool]:
        """Return the text of generated ids without the thoughts that it begins with, and whether there were any.

        Special tokens and outer white space are left out.
        """
        text, thoughts = without_thoughts(str(self.tokenizer.decode(ids, skip_special_tokens=False)))
        if not thoughts:
            return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip(), False
        for token in filter(None, self._control.values()):
            text = text.replace(token, "")
        return text.strip(), True

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of generated ids, without special tokens, thoughts and outer white space."""
        return self.spoken(ids)[0]


def _as_turns(prompt: Prompt) -> list[Turn]:
    return [Turn("user", prompt)] if isinstance(prompt, str) else list(prompt)


def _without_first(turns: Sequence[Turn]) -> list[Turn]:
    """Return a conversation without its first exchange, but for a system prompt; the last exchange stays."""
    system = [turn for turn in turns[:1] if turn.role == "system"]
    asked = [place for place, turn in enumerate(turns) if turn.role == "user"]
    return [*system, *turns[asked[1] :]] if len(asked) > 1 else list(turns)


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many items two sequences begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
