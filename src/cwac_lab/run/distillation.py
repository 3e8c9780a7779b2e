"""The loss of the alignment stage: refusals are learned, own answers distilled from the original model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from cwac_lab.defenses.interface import Defense
from cwac_lab.defenses.literature.start import StartLogits, answer_counts
from cwac_lab.models.answers import Batch, answer_logits, mean_over_answers
from cwac_lab.models.chat import Encoded

# The loss in words, for the recipe of a start.
LOSS = "cross-entropy on refusals, KL(original || model) on own answers; mean over answer tokens"


@dataclass
class Distillation(Defense):
    """Cross-entropy on refusals; on own answers ``KL(pi_0(.|t) || pi(.|t))`` to the original (Hinton et al. 2015).

    Greedy answers taught by cross-entropy would make a model surer of them than the original is. Where an own answer is
    not what the original says first (it was asked again without the opening of a decline), cross-entropy stays.

    Attributes:
        model: The original with its adapters, whose B is zero.
        pad_id: Id to pad with.
        own: The rows with own answers.
    """

    model: Any = None
    pad_id: int = 0
    own: Sequence[Encoded] = field(default_factory=list)

    def begin(self, total_steps: int, examples: Sequence[Encoded]) -> None:
        """Keep what the original says to the prompts with own answers."""
        self._start = StartLogits(self.model, self.own, self.pad_id)

    def task_loss(self, model: Any, batch: Batch, step: int) -> Float[Tensor, ""]:
        """Return the mean over a batch's answer tokens, shape ()."""
        logits, targets = answer_logits(model, batch)
        logits = logits.float()
        losses = cross_entropy(logits, targets, reduction="none")
        rows = self._start.known(batch)
        if rows.any():
            kept = rows.repeat_interleave(answer_counts(batch["labels"]))
            before = self._start.of(batch, rows).float()
            moved = kl_div(logits[kept].log_softmax(-1), before.log_softmax(-1), log_target=True, reduction="none")
            said = before.argmax(-1) == targets[kept]
            losses = losses.masked_scatter(kept, moved.sum(-1).where(said, losses[kept]))
        return mean_over_answers(losses, batch)
