"""Forms of a prompt: the words before it, and the chat template it is asked in."""

from __future__ import annotations

from dataclasses import dataclass, field

from cwac_lab.core.errors import ConfigError
from cwac_lab.models.templates import check_template


@dataclass
class Form:
    """A way to ask a prompt other than as it stands in the model's own template.

    Attributes:
        prefix: What stands before the prompt.
        template: Chat template; None for the model's own. What begins the model's own prompts is put before it.
    """

    prefix: str = ""
    template: str | None = None


@dataclass
class FormsConfig:
    """The ``forms`` group: in which forms a constraint's reference prompts are asked.

    The paper asks in one; others are this project's addition. They make the set of reference prompts that many times
    larger: the directions of a given ``energy`` grow in number, and each step of the activation constraint, which
    draws from all, sees fewer prompts of the model's own form.

    Attributes:
        name: How tables call it.
        others: Forms by name, beside the prompts as they stand in the model's own template; held in the given order.
    """

    name: str = "own"
    others: dict[str, Form] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that every form changes something, by a template that asks the prompt."""
        for name, form in self.others.items():
            if not form.prefix and form.template is None:
                raise ConfigError(f"others.{name}.prefix", form.prefix, "a prefix, a template, or both")
            check_template(f"others.{name}.template", form.template)
        if self.others and self.name == "own":
            raise ConfigError("name", self.name, "a name of its own for tables, with forms.others")
