"""SafeGrad (Yi et al. 2025, arXiv 2508.07172): take out of the user gradient what works against the alignment gradient.

``g_a`` is the gradient of ``KL(pi_0 || pi_theta)`` on refusals; where ``<g_u, g_a> < 0``,
``g_u <- g_u - <g_u, g_a> / ||g_a||^2 g_a``; the step takes ``g_u + rho g_a``. The test is on the whole gradient vector.

Fidelity: variant. Neither the authors' code nor the full paper was at hand: the rule is that of a third-party
implementation (rho 1, temperature 1), whose texts differ on whether the divergence is taken on alignment or user
data. Surgery comes before clipping; with accumulation it acts on the summed user gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cwac_lab.core import distributed
from cwac_lab.core.errors import in_range
from cwac_lab.defenses.interface import Context, Defense, Requirements
from cwac_lab.defenses.literature.kl import divergence
from cwac_lab.defenses.literature.refusals import Refusals
from cwac_lab.defenses.literature.start import StartLogits

# At the start the divergence has no gradient; what rounding leaves of it, relative to the user's, is no direction.
NOISE = 1e-4


@dataclass
class SafeGrad(Defense):
    """Gradient surgery against refusals.

    Attributes:
        strength: Weight of the alignment gradient, rho; 0 switches the method off, surgery included.
        batch_size: Refusals a step.
    """

    strength: float = 1.0
    batch_size: int = 4

    @property
    def shardable(self) -> bool:
        """A gradient beside that of the backward pass is not gathered."""
        return False

    def __post_init__(self) -> None:
        """Check the fields."""
        in_range("strength", self.strength, 0)
        in_range("batch_size", self.batch_size, 1)

    @property
    def requirements(self) -> Requirements:
        """The refusals."""
        return Requirements(reference_prompts=self.strength > 0)

    def prepare(self, context: Context) -> None:
        """Take the refusals and keep what the start answers there."""
        self._model, self._autocast = context.model, context.autocast
        self._refusals = Refusals(context, "safegrad", self.batch_size)
        self._conflicts, self._start = 0, None
        if self.strength:
            with context.autocast():
                self._start = StartLogits(context.model, self._refusals.rows, context.chat.pad_id)

    def after_backward(self, step: int) -> None:
        """Replace the gradients by the operated ones."""
        if self._start is None:
            return
        # Every device takes a part of the refusals; their gradients are averaged, and so the same everywhere.
        batch = self._refusals.batch(step, distributed.rank(), distributed.world())
        trained = [p for p in self._model.parameters() if p.requires_grad and p.grad is not None]
        with torch.enable_grad(), self._autocast():
            aligned = torch.autograd.grad(divergence(self._model, self._start, batch), trained, allow_unused=True)
        used = [(p, g) for p, g in zip(trained, aligned, strict=True) if g is not None]
        pairs = [(p, distributed.summed(g) / distributed.world()) for p, g in used]
        with torch.no_grad():
            inner = torch.stack([(p.grad * g).sum() for p, g in pairs]).sum()
            square = torch.stack([g.square().sum() for _, g in pairs]).sum()
            user = torch.stack([p.grad.square().sum() for p, _ in pairs]).sum()
            conflict = bool(inner < 0) and bool(square > NOISE**2 * user)
            factor = self.strength - (float(inner / square) if conflict else 0.0)
            for p, g in pairs:
                p.grad.add_(g, alpha=factor)
        self._conflicts += conflict

    def state_dict(self) -> dict[str, Tensor]:
        """Return the number of conflicts."""
        return {"conflicts": torch.tensor(self._conflicts)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take it back."""
        self._conflicts = int(state["conflicts"])

    def step_metrics(self, step: int) -> dict[str, float]:
        """Return how many steps had a conflict so far."""
        return {"safegrad/conflicts": float(self._conflicts)} if self._start is not None else {}
