"""One chat format for training and evaluation: the model's own template, with exact prompt/response boundaries."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

IGNORED = -100


@dataclass(frozen=True)
class Encoded:
    """Token ids of one conversation; ``labels`` are ``IGNORED`` on the prompt. Both lists have length T."""

    input_ids: list[int]
    labels: list[int]


class ChatFormat:
    """Renders prompts and responses through a tokenizer's chat template."""

    def __init__(self, tokenizer: Any, max_length: int = 512) -> None:
        """Wrap a tokenizer; conversations are cut to ``max_length`` tokens."""
        self.tokenizer, self.max_length = tokenizer, max_length
        self.end_id: int = self._end_of_turn()
        self.pad_id: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.end_id

    def _render(self, prompt: str, response: str | None) -> str:
        messages = [{"role": "user", "content": prompt}]
        if response is not None:
            messages.append({"role": "assistant", "content": response})
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=response is None)
        return str(text)

    def with_template(self, template: str | None) -> ChatFormat:
        """Return a format that renders by another template; what begins prompts and ends answers is as in this one.

        None stands for the template of this one.
        """
        if template is None:
            return self
        begin = self.tokenizer.bos_token
        if begin and self._render("question", None).startswith(begin):
            template = begin + template
        changed = copy.copy(self)
        changed.tokenizer = copy.deepcopy(self.tokenizer)
        changed.tokenizer.chat_template = template
        return changed

    def _end_of_turn(self) -> int:
        """Return the special token with which the template closes an answer (EOS where it has none of its own)."""
        tail = self._render("question", "answer").rpartition("answer")[2]
        # Control tokens of a template need not be among the tokenizer's named special tokens (Gemma's base models).
        control = {token for token, added in self.tokenizer.added_tokens_decoder.items() if added.special}
        special = [token for token in self.tokens(tail) if token in control]
        return int(special[0] if special else self.tokenizer.eos_token_id)

    def tokens(self, text: str) -> list[int]:
        """Return the ids of a text as it stands, without special tokens of the tokenizer's own."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def prompt_ids(self, prompt: str) -> list[int]:
        """Return the ids after which the model's answer starts (template with generation prompt)."""
        return self.tokens(self._render(prompt, None))

    def encode(self, prompt: str, response: str) -> Encoded:
        """Return a training example: loss on the response and its end-of-turn token only.

        Prompt and response are tokenised apart, so that the prompt's tokens are those seen at generation. A prompt
        that leaves no room is cut from the left, a response that is too long from the right.
        """
        head, full = self._render(prompt, None), self._render(prompt, response)
        if not full.startswith(head):
            # A template that strips or rewrites the answer (e.g. Llama 2's spaces) still ends the turn with EOS.
            tail = response + self.tokenizer.convert_ids_to_tokens(self.end_id)
        else:
            tail = full[len(head) :]
        answer = self.tokens(tail)
        if self.end_id in answer:
            answer = answer[: answer.index(self.end_id) + 1]
        prompt_ids = self.tokens(head)
        answer = answer[: self.max_length - 1]
        prompt_ids = prompt_ids[max(0, len(prompt_ids) + len(answer) - self.max_length) :]
        return Encoded(prompt_ids + answer, [IGNORED] * len(prompt_ids) + answer)

    def encode_own(self, prompt: str, answer: str, *, ended: bool) -> Encoded:
        """Return an answer that a model gave as a training example.

        One that the limit of tokens cut off is given no end of turn, or the model would learn to stop midway.
        """
        encoded = self.encode(prompt, answer)
        return encoded if ended else Encoded(encoded.input_ids[:-1], encoded.labels[:-1])

    def decode(self, ids: list[int]) -> str:
        """Return the text of generated ids, without special tokens and outer white space."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()
