"""Forms of a prompt: the words before it, and the chat template it is asked in."""

from __future__ import annotations

from dataclasses import dataclass, field

from jinja2 import Environment, TemplateSyntaxError

from cwac_lab.errors import ConfigError


@dataclass
class Form:
    """A way to ask a prompt other than as it stands in the model's own template.

    Attributes:
        prefix: What stands before the prompt.
        template: Chat template; None for the model's own.
    """

    prefix: str = ""
    template: str | None = None


@dataclass
class FormsConfig:
    """The ``forms`` group: in which forms a constraint's reference prompts are asked.

    Attributes:
        name: How tables call it.
        others: Forms by name, beside the prompts as they stand in the model's own template.
    """

    name: str = "own"
    others: dict[str, Form] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that every form changes something, by a template that can be read."""
        for name, form in self.others.items():
            if not form.prefix and form.template is None:
                raise ConfigError(f"others.{name}.prefix", form.prefix, "a prefix, a template, or both")
            check_template(f"others.{name}.template", form.template)


def check_template(key: str, template: str | None) -> None:
    """Raise ``ConfigError`` unless a chat template, where there is one, can be read."""
    try:
        Environment().parse(template or "")
    except TemplateSyntaxError as error:
        raise ConfigError(key, template, f"a Jinja template ({error})") from None
