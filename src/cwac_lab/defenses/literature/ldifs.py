"""LDIFS (Mukhoti et al. 2024): features of the training inputs stay where they were.

``L = CE + alpha * mean_l mean_t || h_l/|h_l| - h0_l/|h0_l| ||^2`` over real tokens t and hooked layers l.

Fidelity: variant. Unit-normalised features as in the authors' vision code, of a decoder's residual stream; pads are
left out and no layer's term is ever dropped (a public language-model port adds a term only while it is below 0.1).
The natural control for CWAC's activation half: all directions, and the task's inputs instead of harmful reference
prompts. ``held_on=refusals`` (not the paper's) takes all tokens of refusals to these prompts: nearer to that half,
which holds the last tokens of prompts and one layer by default.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from cwac_lab.core.errors import ConfigError, in_range
from cwac_lab.defenses.interface import Context, Defense, Requirements
from cwac_lab.defenses.literature.refusals import Refusals, check_held_on
from cwac_lab.defenses.literature.start import StartModel
from cwac_lab.models.answers import Batch, mean_over_tokens
from cwac_lab.models.capture import layer_outputs
from cwac_lab.models.sites import decoder_layers, depth_to_layer


@dataclass
class LDIFS(Defense):
    """Penalise the distance of normalised features to their start.

    Attributes:
        strength: Weight of the distance of features, alpha of the paper; 0 switches it off.
        depths: Relative depths of the hooked layers.
        held_on: ``task``: on the inputs that are trained on; ``refusals``: on refusals to the reference prompts.
        batch_size: Refusals a step.
    """

    strength: float = 0.05
    depths: list[float] = field(default_factory=lambda: [0.25, 0.5, 0.75, 0.97])
    held_on: str = "task"
    batch_size: int = 4

    def __post_init__(self) -> None:
        """Check the fields."""
        in_range("strength", self.strength, 0)
        if not self.depths or any(not 0 <= depth < 1 for depth in self.depths):
            raise ConfigError("depths", list(self.depths), "a list of relative depths in [0, 1)")
        check_held_on(self.held_on)
        in_range("batch_size", self.batch_size, 1)

    @property
    def requirements(self) -> Requirements:
        """The refusals, where they are used."""
        return Requirements(reference_prompts=self.held_on == "refusals" and self.strength > 0)

    @property
    def copies(self) -> float:
        """The start."""
        return float(self.strength > 0)

    def prepare(self, context: Context) -> None:
        """Keep the start, and take the refusals."""
        self._refusals = Refusals(context, "ldifs", self.batch_size)
        self._start = StartModel(context.model) if self.strength else None
        n_layers = len(decoder_layers(context.model))
        self._layers = sorted({depth_to_layer(depth, n_layers) for depth in self.depths})

    def loss_terms(self, model: Any, batch: Batch, step: int) -> dict[str, Float[Tensor, ""]]:
        """Return the penalty, of shape ()."""
        if self._start is None:
            return {}
        if self.held_on == "refusals":
            batch = self._refusals.beside(batch, step)
        inputs = batch["input_ids"], batch["attention_mask"]
        now = layer_outputs(model, self._layers, *inputs)
        with torch.no_grad(), self._start.model() as start:
            before = layer_outputs(start, self._layers, *inputs)
        real = batch["attention_mask"].bool()
        moved = [
            (normalize(now[layer][real].float(), dim=-1) - normalize(before[layer][real].float(), dim=-1)).square()
            for layer in self._layers
        ]
        return {"ldifs": self.strength * torch.stack([mean_over_tokens(m.sum(-1), batch) for m in moved]).mean()}
