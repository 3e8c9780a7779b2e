"""KL to the start: the answers' distributions stay near those of the start model.

Fidelity: exact, ``L = CE + lambda mean_t KL(pi_0(.|t) || pi_theta(.|t))`` over answer tokens; written for the
vocabulary dimension and without pads (a public implementation takes the softmax over positions). The start's last
hidden states at the answer tokens are computed once, before training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import kl_div

from cwac_lab.core.errors import in_range
from cwac_lab.defenses.interface import Context, Defense, Requirements
from cwac_lab.defenses.literature.refusals import Refusals, check_held_on
from cwac_lab.defenses.literature.start import StartLogits
from cwac_lab.models.answers import Batch, answer_logits, mean_over_answers
from cwac_lab.models.chat import Encoded


def divergence(model: Any, start: StartLogits, batch: Batch) -> Float[Tensor, ""]:
    """Return the mean of ``KL(pi_0 || pi_theta)`` over a batch's answer tokens, shape ()."""
    now, before = answer_logits(model, batch)[0], start.of(batch)
    moved = kl_div(now.float().log_softmax(-1), before.float().log_softmax(-1), log_target=True, reduction="none")
    return mean_over_answers(moved.sum(-1), batch)


@dataclass
class KL(Defense):
    """Penalise the divergence from the start model.

    Attributes:
        strength: Weight of the divergence, lambda; 0 switches it off.
        held_on: ``task``: on the batch that is trained on; ``refusals``: on refusals to the reference prompts.
        batch_size: Refusals a step.
        every_n_steps: The penalty is computed every n-th step and multiplied by n. That keeps the mean of its gradient,
            at about an n-th of its cost in training. It does not keep its effect: AdamW's scaling and clipping see
            n-fold gradients, so strengths compare at equal n only, and n is meant to be far below a run's steps.
    """

    strength: float = 1.0
    held_on: str = "task"
    batch_size: int = 4
    every_n_steps: int = 1

    def __post_init__(self) -> None:
        """Check the fields."""
        in_range("strength", self.strength, 0)
        check_held_on(self.held_on)
        in_range("batch_size", self.batch_size, 1)
        in_range("every_n_steps", self.every_n_steps, 1)
        self._start: StartLogits | None = None

    @property
    def requirements(self) -> Requirements:
        """The refusals, where they are used."""
        return Requirements(reference_prompts=self.held_on == "refusals" and self.strength > 0)

    def prepare(self, context: Context) -> None:
        """Take the refusals."""
        self._context = context
        self._refusals = Refusals(context, "kl", self.batch_size)

    def begin(self, total_steps: int, examples: Sequence[Encoded]) -> None:
        """Keep what the start answers to the rows that the divergence is taken on (Lisa may train on refusals)."""
        if self.strength:
            rows = [*(examples if self.held_on == "task" else ()), *self._refusals.rows]
            with self._context.autocast():
                self._start = StartLogits(self._context.model, rows, self._context.chat.pad_id)

    def loss_terms(self, model: Any, batch: Batch, step: int) -> dict[str, Float[Tensor, ""]]:
        """Return the penalty, of shape ()."""
        if self._start is None or step % self.every_n_steps:
            return {}
        if self.held_on == "refusals":
            batch = self._refusals.beside(batch, step // self.every_n_steps)
        return {"kl": self.strength * self.every_n_steps * divergence(model, self._start, batch)}
