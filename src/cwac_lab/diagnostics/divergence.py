"""How far a model's next words are from its start's, at the first tokens of the start's own answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils import parametrize

from cwac_lab.data.batches import collate
from cwac_lab.diagnostics.probe import evaluating, first_tokens
from cwac_lab.diagnostics.stream import divergences
from cwac_lab.models.answers import answer_logits, to_device
from cwac_lab.models.chat import IGNORED, Encoded


class Divergence:
    """``KL(start || model)`` at the first tokens of answers of the start."""

    def __init__(self, start: Any, answers: Sequence[Encoded], pad_id: int) -> None:
        """Run the start on prompts with its own answers.

        Args:
            start: The start model.
            answers: Prompts with its answers.
            pad_id: Id to pad with.
        """
        self._batch = collate([first_tokens(row) for row in answers], pad_id)
        self._tokens = (self._batch["labels"] != IGNORED).sum(1).tolist()
        self._start = self._log_probs(start)

    @torch.no_grad()
    def _log_probs(self, model: Any) -> Float[Tensor, "A V"]:
        with parametrize.cached(), evaluating(model):
            logits = answer_logits(model, to_device(self._batch, model.device))[0]
        return logits.float().cpu().double().log_softmax(-1)  # in float32 what is below 1e-6 nats would be rounding

    def by_answer(self, model: Any) -> list[Float[Tensor, " t"]]:
        """Return the divergence in nats at the first tokens of each answer."""
        found = divergences(self._start, self._log_probs(model))
        return list(torch.split(found, self._tokens))

    def __call__(self, model: Any) -> float:
        """Return the mean divergence over all these tokens, in nats."""
        return float(torch.cat(self.by_answer(model)).mean())
