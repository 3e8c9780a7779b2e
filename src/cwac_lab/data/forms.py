"""Forms of a prompt: the system prompt and the words before it, and the chat template it is asked in."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from cwac_lab.core.errors import ConfigError, in_range
from cwac_lab.data.beginnings import WORDS as LEAST
from cwac_lab.data.beginnings import beginnings, foreign, is_part
from cwac_lab.models.templates import Turn, check_template, shortened

# How records call the form of a prompt: as it stands, under the system prompt of the task's rows, and behind words
# that many of the rows begin with.
OWN, SYSTEM, WORDS = "own", "system", "words"


@dataclass
class Form:
    """A way to ask a prompt other than as it stands in the model's own template.

    Attributes:
        prefix: What stands before the prompt.
        template: Chat template; None for the model's own. What begins the model's own prompts is put before it.
        system: System prompt; None for none. A template without a system role shows it before the prompt.
        rows: Instead of these: as a prefix, every beginning that so large a share of the distinct prompts to train on
            has in common; in (0, 1].
        instruction: Whether the task's own instruction counts as such a beginning.
    """

    prefix: str = ""
    template: str | None = None
    system: str | None = None
    rows: float | None = None
    instruction: bool = True

    def asked(self, prompt: str) -> str | tuple[Turn, ...]:
        """Return what a model is asked: a prompt, or a conversation that ends with it."""
        words = self.prefix + prompt
        return (Turn("system", self.system), Turn("user", words)) if self.system else words


@dataclass
class FormsConfig:
    """The ``forms`` group: in which forms a constraint's reference prompts are asked.

    The paper asks in one; others are this project's addition. They make the set of reference prompts that many times
    larger: the directions of a given ``energy`` grow in number, and each step of the activation constraint, which
    draws from all, sees fewer prompts of the model's own form.

    Attributes:
        name: How tables call it.
        others: Forms by name, beside the prompts as they stand in the model's own template; held in the given order.
            A task whose rows have a system prompt adds one of its own, ``system``.
    """

    name: str = OWN
    others: dict[str, Form] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that every form changes something, by a template that asks the prompt."""
        for name, form in self.others.items():
            if name in (OWN, SYSTEM):
                raise ConfigError("others", name, f"another name: {OWN} and {SYSTEM} are taken")
            if form.rows is not None:
                in_range(f"others.{name}.rows", form.rows, 0, 1, open_low=True)
                if form != Form(rows=form.rows, instruction=form.instruction):
                    raise ConfigError(f"others.{name}.rows", form.rows, "nothing beside it")
                if taken := [other for other in self.others if re.fullmatch(rf"{re.escape(name)} \d+", other)]:
                    raise ConfigError("others", taken[0], f"another name: {name} names the beginnings it finds so")
            elif not form.instruction:
                raise ConfigError(f"others.{name}.instruction", False, f"true without others.{name}.rows")
            if not form.prefix and form.template is None and not form.system and form.rows is None:
                raise ConfigError(
                    f"others.{name}.prefix", form.prefix, "a prefix, a template, a system prompt, or rows"
                )
            check_template(f"others.{name}.template", form.template)
        if self.others and self.name == OWN:
            raise ConfigError("name", self.name, "a name of its own for tables, with forms.others")

    def fixed(self) -> dict[str, Form]:
        """Return the forms that are known before any row is."""
        return {name: form for name, form in self.others.items() if form.rows is None}

    def not_held(self, turns: Sequence[Sequence[str]], instruction: str = "") -> str:
        """Return a line on beginnings of prompts that are neither a form nor the task's own instruction; may be empty.

        Args:
            turns: As for ``after``.
            instruction: What the task puts before its own prompts.
        """
        held = {form.prefix.strip() for form in self.others.values() if form == Form(form.prefix)}
        found = [each for each in foreign(turns, instruction) if each[0].strip() not in held]
        if not found:
            return ""
        prefix, count, total = found[0]
        more = f" ({len(found) - 1} more like this)" if len(found) > 1 else ""
        told = f"{count} of {total} prompts begin with {shortened(prefix.strip())!r}{more}"
        return f"{told}: refusals are not held behind these words; forms=foreign holds them"

    def after(self, turns: Sequence[Sequence[str]], say: Callable[[str], None], instruction: str = "") -> FormsConfig:
        """Return the forms with the beginnings of prompts in the place of those that ask for them.

        Args:
            turns: Those of the rows to train on, as they are asked; of conversations the first and the last ones.
            say: Told which beginnings they are.
            instruction: What the task puts before its own prompts.
        """
        others, distinct = self.fixed(), [list(dict.fromkeys(prompts)) for prompts in turns]
        for name, form in self.others.items():
            if form.rows is None:
                continue
            found: dict[str, None] = {}
            for prompts in distinct:
                for prefix, count in beginnings(prompts, form.rows).items():
                    own = not form.instruction and is_part(prefix, instruction)
                    left = ", the task's own instruction, which is left out" * own
                    say(f"forms.others.{name}: {count} of {len(prompts)} prompts begin with {prefix!r}{left}")
                    found |= {} if own else {prefix: None}
            new = [prefix for prefix in found if Form(prefix) not in others.values()]
            others |= {f"{name} {number}": Form(prefix) for number, prefix in enumerate(new, start=1)}
            if found:
                say(f"forms.others.{name}: refusals are held behind these words")
            else:
                least = f"{100 * form.rows:g} % of {' and '.join(str(len(prompts)) for prompts in distinct)} prompts"
                other = "" if form.instruction else "other "
                say(f"forms.others.{name}: no {other}beginning of {LEAST} words or more is shared by {least}")
        return replace(self, others=others)
