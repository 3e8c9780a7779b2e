"""One chat format for training and evaluation: the model's own template, with exact prompt/response boundaries.

A template is taken as it comes and checked once, with a question and an answer of its own. What it leaves open is
closed here, so that the ids that training sees before an answer are those that generation starts from, and that an end
is taught; ``ChatFormat.remarks`` tells what was.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cwac_lab.core.errors import ConfigError, MissingAsset
from cwac_lab.models.templates import ANSWER, QUESTION, VARIABLES, Message, Shape, on_the_day, shape_of
from cwac_lab.models.thoughts import closing_of, without_thoughts

IGNORED = -100
_KEY = "model.chat_template"


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
        asked, full = self._render(QUESTION, None), self._render(QUESTION, ANSWER) if answers else ""
        before, _, self._after = full.rpartition(ANSWER)
        self._lead = self._leading(asked, before)
        alike = [self.tokens(self._head(text)) for text in (QUESTION, ANSWER)]
        self._opening, self._closing = _shared(*alike), _shared(*(ids[::-1] for ids in alike))
        if self._opening + self._closing >= self.max_length:
            least = f"> {self._opening + self._closing}, the tokens that the chat template itself takes"
            raise ConfigError("trainer.max_length", self.max_length, least)
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

    def _render(self, prompt: str, response: str | None) -> str:
        return self._apply(self._shape.messages(prompt, response), response is None)

    def _head(self, prompt: str) -> str:
        return self._render(prompt, None) + self._lead

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
        if begin and self._head(QUESTION).startswith(begin) and not changed._head(QUESTION).startswith(begin):
            changed.tokenizer.chat_template = begin + template
            changed._read(answers=False)
        return changed

    def tokens(self, text: str) -> list[int]:
        """Return the ids of a text as it stands, without special tokens of the tokenizer's own."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def ends(self, others: Iterable[int]) -> list[int]:
        """Return the ids that end an answer: the end of turn first, then the tokenizer's and those of others.

        Of others those are left out that are words to the tokenizer: a config may name an end of another one.
        """
        known = {token for token in (self.tokenizer.eos_token_id, *others) if token in self._control}
        return [self.end_id, *sorted(known - {self.end_id})]

    def prompt_ids(self, prompt: str) -> list[int]:
        """Return the ids after which the model's answer starts (template with generation prompt), cut to the limit."""
        return self._fitted(self.tokens(self._head(prompt)), self.max_length)

    def n_cut(self, prompts: Iterable[str]) -> int:
        """Return how many prompts are longer than the limit, so that ``prompt_ids`` cuts them."""
        return sum(len(self.tokens(self._head(prompt))) > self.max_length for prompt in prompts)

    def told_cut(self, cut: int, of: int, what: str, more: str = "") -> Iterator[str]:
        """Yield a line that tells how many of so many prompts or rows are cut, where any are."""
        if cut:
            limit = f"trainer.max_length={self.max_length} tokens"
            yield f"{cut} of {of} {what} are longer than {limit}: their prompts are cut from the left{more}"

    def _fitted(self, ids: list[int], room: int) -> list[int]:
        """Return a prompt's ids cut to ``room``: the user's words from the left, and the template's if it must be."""
        keep = self._opening if room > self._opening + self._closing else 0
        return ids[:keep] + ids[keep + max(0, len(ids) - room) :]

    def encode(self, prompt: str, response: str) -> Encoded:
        """Return a training example: loss on the response and its end-of-turn token only.

        The prompt's tokens are those seen at generation. A prompt that leaves no room is cut from the left, behind the
        template's opening, a response that is too long from the right.
        """
        head, full = self._head(prompt), self._render(prompt, response)
        # A template that strips or rewrites the answer (e.g. Llama 2's spaces) still ends the turn.
        tail = full[len(head) :].removesuffix(self._after) if full.startswith(head) else response
        prompt_ids, whole = self.tokens(head), self.tokens(head + tail)
        # Apart from its prompt the first word of an answer would be another token to some tokenizers (Llama 2's).
        together = whole[: len(prompt_ids)] == prompt_ids
        answer = whole[len(prompt_ids) :] if together else self.tokens(tail)
        answer = answer[: answer.index(self.end_id)] if self.end_id in answer else answer
        answer = [*answer, self.end_id]
        cut = len(prompt_ids) + len(answer) > self.max_length
        answer = answer[: self.max_length - 1]
        prompt_ids = self._fitted(prompt_ids, self.max_length - len(answer))
        return Encoded(prompt_ids + answer, [IGNORED] * len(prompt_ids) + answer, cut)

    def encode_own(self, prompt: str, answer: str, *, ended: bool) -> Encoded:
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


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many items two sequences begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
