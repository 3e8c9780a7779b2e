"""AsFT (Yang et al. 2025, arXiv 2506.08473): updates orthogonal to the alignment direction are penalised.

``L = CE + lambda sum_i ||(I - C_i) dW_i||_F^2`` with SafeLoRA's C.

Fidelity: variant. The penalty is the paper's, on the updates of the attention projections. With ``tuning=full`` the
rest trains freely, where in the paper only LoRA factors train: ``tuning=lora tuning.modules=query_value``. The
authors' code leaves the LoRA scale out of ``dW``, so lambda here is ``(alpha / r)^2`` times as strong. Since
the mean eigenvalue of the released C is ``||V||_F / m``, ``I - C`` is close to the identity, and the penalty to plain
L2 on the same layers: ``direction=none`` (C = 0) is that control, ``direction=random`` a random C of the same
spectrum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from cwac_lab.core.errors import in_range, one_of
from cwac_lab.defenses.interface import Context, Defense, Requirements
from cwac_lab.defenses.literature.directions import directed
from cwac_lab.models.answers import Batch
from cwac_lab.models.sites import SCOPES


def rotated(matrix: Float[Tensor, "m m"], source: torch.Generator) -> Float[Tensor, "m m"]:
    """Return a symmetric matrix with the same eigenvalues and random eigenvectors."""
    basis = torch.linalg.qr(torch.randn(matrix.shape, generator=source)).Q.to(matrix)
    return basis @ matrix @ basis.T


@dataclass
class AsFT(Defense):
    """Penalise what an update does outside the alignment direction.

    Attributes:
        strength: Weight of the penalty, lambda of the paper; 0 switches it off.
        modules: Scope of linear layers.
        mode: ``as_released`` or ``exact``, see ``directions``.
        rank: Directions of ``exact``.
        direction: ``aligned``; ``random`` and ``none`` are controls.
    """

    strength: float = 1.0
    modules: str = "attention"
    mode: str = "as_released"
    rank: int = 64
    direction: str = "aligned"

    precedence: ClassVar[int] = 3

    def __post_init__(self) -> None:
        """Check the fields."""
        in_range("strength", self.strength, 0)
        one_of("modules", self.modules, SCOPES)
        one_of("mode", self.mode, ("as_released", "exact"))
        in_range("rank", self.rank, 1)
        one_of("direction", self.direction, ("aligned", "random", "none"))

    @property
    def requirements(self) -> Requirements:
        """The weights before alignment."""
        return Requirements(base_weights=self.strength > 0)

    def prepare(self, context: Context) -> None:
        """Compute C of every layer in scope."""
        self._layers = list(directed(context, self.modules, self.mode, self.rank)) if self.strength else []
        source = torch.Generator().manual_seed(context.seed)
        for layer in self._layers:
            if self.direction == "random":
                layer.matrix = rotated(layer.matrix, source)
            elif self.direction == "none":
                layer.matrix = torch.zeros_like(layer.matrix)

    def loss_terms(self, model: Any, batch: Batch, step: int) -> dict[str, Float[Tensor, ""]]:
        """Return the penalty, of shape ()."""
        if not self._layers:
            return {}
        with torch.autocast(model.device.type, enabled=False):  # in bfloat16 the product's rounding would be penalised
            return {"asft": self.strength * torch.stack([layer.outside() for layer in self._layers]).sum()}
