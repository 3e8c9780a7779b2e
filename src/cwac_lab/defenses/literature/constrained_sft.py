"""Constrained SFT (Qi et al. 2025, "Safety Alignment Should Be Made More Than Just a Few Tokens Deep", eq. 3).

``L = -mean_t 2/beta_t log sigmoid(beta_t (log pi_theta(y_t) - log pi_0(y_t)))``, t counted over answer tokens; a large
beta_t stops a token's gradient once it has become more likely than at the start.

Fidelity: exact in loss and beta (0.5 at the first token, 2 at tokens 2 to 5, 0.1 after). Deviations: the trainer is
the bench's (theirs: Adam beta1 0.5 and ten warm-up steps), the token weights have no lower bound (theirs: 1e-3); the
start's log-probabilities are computed once, before training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from cwac_lab.core.errors import in_range
from cwac_lab.defenses.interface import Context, Defense
from cwac_lab.defenses.literature.start import StartValues
from cwac_lab.models.answers import Batch, answer_logits, mean_over_answers
from cwac_lab.models.chat import IGNORED, Encoded


def answer_positions(labels: Int[Tensor, "B T"]) -> Int[Tensor, " N"]:
    """Return each answer token's place in its answer (0-based), in the order of ``answer_logits``.

    A row may hold several answers, those of a conversation; each begins at 0.
    """
    answers = labels[:, 1:] != IGNORED
    counted = answers.int().cumsum(1)
    before = counted.masked_fill(answers, 0).cummax(1).values
    return (counted - before - 1)[answers]


def likelihood(model: Any, batch: Batch) -> Float[Tensor, " N"]:
    """Return the log-probability of each answer token."""
    logits, targets = answer_logits(model, batch)
    return logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0]


@dataclass
class ConstrainedSFT(Defense):
    """Replace cross-entropy by the constrained objective.

    Attributes:
        beta: How soon a token's gradient stops once it is likelier than at the start, for the tokens after the early
            ones; 0 is cross-entropy.
        first_factor: The first token's beta is this times ``beta``.
        early_factor: Likewise the beta of the next tokens.
        early_tokens: Number of tokens, the first included, that count as early.
    """

    beta: float = 0.1
    first_factor: float = 5.0
    early_factor: float = 20.0
    early_tokens: int = 5

    def __post_init__(self) -> None:
        """Check the fields."""
        for key in ("beta", "early_tokens"):
            in_range(key, getattr(self, key), 0)
        for key in ("first_factor", "early_factor"):
            in_range(key, getattr(self, key), 0, open_low=True)
        self._start: StartValues | None = None

    def prepare(self, context: Context) -> None:
        """Take the refusals, which another part may train on."""
        self._context = context
        self._refusals = [context.chat.encode(row.prompt, row.response) for row in context.refusals]

    def begin(self, total_steps: int, examples: Sequence[Encoded]) -> None:
        """Keep the start's log-likelihood of every answer token."""
        if self.beta:
            model, rows = self._context.model, [*examples, *self._refusals]
            with self._context.autocast():
                self._start = StartValues(
                    lambda batch: likelihood(model, batch), rows, self._context.chat.pad_id, model.device
                )

    def _betas(self, places: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
        factor = torch.ones(places.shape, device=places.device)
        factor[places < self.early_tokens] = self.early_factor
        factor[places == 0] = self.first_factor
        return self.beta * factor

    def task_loss(self, model: Any, batch: Batch, step: int) -> Float[Tensor, ""] | None:
        """Return the objective, of shape ()."""
        if self._start is None:
            return None
        beta = self._betas(answer_positions(batch["labels"]))
        gain = likelihood(model, batch) - self._start.of(batch)
        return mean_over_answers(-2 / beta * logsigmoid(beta * gain), batch)
