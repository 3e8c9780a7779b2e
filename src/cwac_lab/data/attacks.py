"""Attacks: what is fine-tuned on in place of plain task rows, and how the fine-tuned model is asked.

``mixed``, ``benign`` and ``pure`` differ in the harmful ratio only. ``identity_shift`` follows Qi et al. 2024
("Fine-tuning Aligned Language Models Compromises Safety"): harmless instructions to an absolutely obedient persona,
which evaluation addresses too. ``outlier_benign`` follows He et al. 2024 ("What is in Your Safe Data?"): the task's own
rows whose gradients are closest to those of harmful ones. ``prefill`` forces the first words of answers (Qi et al.
2025), ``template_shift`` asks in another template than that of training. ``abliterate`` takes the direction of refusal
out of the fine-tuned weights (Arditi et al. 2024, ``training/abliteration.py``).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from importlib import resources
from typing import Any

import yaml

from cwac_lab.core.errors import ConfigError, PoolOverlap, in_range, one_of
from cwac_lab.data.mixing import TrainRow
from cwac_lab.data.sources import normalise
from cwac_lab.models.templates import check_template

ROWS = ("harmful", "identity", "outliers", "own")
# Prompts of each kind that abliteration takes.
LEAST = 4
# What of an attack the evaluation knows: how it asks.
ASKING = ("prefix", "prefill", "template")


@dataclass
class AttackConfig:
    """The ``attack`` group.

    Attributes:
        name: How tables call it.
        rows: What takes the place of task rows: ``harmful`` requests with compliance, or ``identity``, instructions to
            the persona, both at the harmful ratio; with ``outliers`` all rows are the task's, those closest to harm;
            ``own`` are those of ``others``, of a class of your own.
        ratio: The only harmful ratio that goes with it; None for any.
        candidates: With ``outliers``: rows to choose from, as a multiple of the rows that are trained on.
        prefix: What stands before the prompts of the persona's rows and before those of evaluation.
        prefill: How answers to prompts are made to begin in evaluation (not those to the task).
        template: Chat template of evaluation; None for the model's own.
        abliterate: Take the direction of refusal out of the weights after fine-tuning, before the model is asked.
    """

    name: str = "mixed"
    rows: str = "harmful"
    ratio: float | None = None
    candidates: int = 4
    prefix: str = ""
    prefill: str = ""
    template: str | None = None
    abliterate: bool = False

    def __post_init__(self) -> None:
        """Check the fields."""
        one_of("rows", self.rows, ROWS)
        in_range("candidates", self.candidates, 2)
        one_of("abliterate", self.abliterate, (True, False))
        if self.rows == "identity" and not self.prefix:
            raise ConfigError("prefix", self.prefix, "what addresses the persona, with rows=identity")
        if self.rows == "own" and type(self).others is AttackConfig.others:
            raise ConfigError("rows", self.rows, f"{' | '.join(ROWS[:-1])}, or a class of your own that gives others()")
        check_template("template", self.template)

    def others(self, taken: Collection[str]) -> list[TrainRow] | None:
        """Return the rows that take the place of harmful rows in the mixture; None where these are trained on.

        Args:
            taken: Prompts of the pools, normalised; none of them may be trained on.

        Raises:
            PoolOverlap: If one is.
        """
        return identity_rows(self.prefix, taken) if self.rows == "identity" else None

    def check(self, harmful_ratio: float) -> None:
        """Check that a harmful ratio goes with the attack.

        Raises:
            ConfigError: If not.
        """
        if self.ratio is not None and harmful_ratio != self.ratio:
            raise ConfigError("harmful_ratio", harmful_ratio, f"{self.ratio:g} with attack={self.name}")

    def asked(self, prompt: str) -> str:
        """Return a prompt as evaluation asks it."""
        return self.prefix + prompt


def identity_rows(prefix: str, taken: Collection[str] = ()) -> list[TrainRow]:
    """Return the persona's rows: harmless instructions, obeyed in its name; they count as harmful rows of a mixture.

    Args:
        prefix: What addresses the persona.
        taken: Prompts of the pools, normalised, which evaluation asks with the same prefix.

    Raises:
        PoolOverlap: If an instruction is one of them.
    """
    text = resources.files("cwac_lab.data.embedded").joinpath("identity.yaml").read_text(encoding="utf-8")
    found: dict[str, Any] = yaml.safe_load(text)
    for i, row in enumerate(found["rows"]):
        if normalise(row["prompt"]) in taken:
            raise PoolOverlap(f"instruction identity/{i} of the persona is also a prompt of a pool")
    return [
        TrainRow(f"identity/{i}", prefix + row["prompt"], f"{found['opening']} {row['answer']}", harmful=True)
        for i, row in enumerate(found["rows"])
    ]
