"""SafeLoRA (Hsu et al. 2024): after training, updates that left the alignment direction are projected on it.

Per linear layer ``cos = <C dW, dW> / (||C dW|| ||dW||)``; where it is lowest, ``dW <- C dW``.

Fidelity: ``mode=as_released`` uses the released ``C = V V^T / ||V||_F``, ``mode=exact`` a true projector of a given
rank. With ``tuning=lora`` and ``tuning.modules=query_value`` the updates are those of the released code (what it does
to B is done to the merged update, which is the same); with ``tuning=full`` the scope is attention while all else
trains too. Deviations: layers are matched by name; ties project no more than k. ``C`` of the released form is no
projector: its mean eigenvalue is ``||V||_F / m``, so it mostly deletes what it is applied to. ``control=zero`` deletes
the same updates outright, which is the control for that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cosine_similarity

from cwac_lab.core.errors import in_range, one_of
from cwac_lab.defenses.interface import Context, Defense, Requirements
from cwac_lab.defenses.literature.directions import directed
from cwac_lab.models.sites import SCOPES


@dataclass
class SafeLoRA(Defense):
    """Project the least aligned updates after training.

    Attributes:
        share: Share of the matrices in scope that are projected (the released default is 10 of 64 at 7B).
        threshold: Instead of the share: all with a cosine of at most this; null uses the share.
        modules: Scope of linear layers.
        mode: ``as_released`` or ``exact``.
        rank: Directions of ``exact``.
        control: ``none``; ``zero``: the chosen updates are deleted instead of projected.
    """

    share: float = 0.15625
    threshold: float | None = None
    modules: str = "attention"
    mode: str = "as_released"
    rank: int = 64
    control: str = "none"

    @property
    def settles_once(self) -> bool:
        """Projected factors would be projected again."""
        return True

    def __post_init__(self) -> None:
        """Check the fields."""
        in_range("share", self.share, 0, 1)
        if self.threshold is not None:
            in_range("threshold", self.threshold, -1, 1)
        one_of("modules", self.modules, SCOPES)
        one_of("mode", self.mode, ("as_released", "exact"))
        in_range("rank", self.rank, 1)
        one_of("control", self.control, ("none", "zero"))

    @property
    def requirements(self) -> Requirements:
        """The weights before alignment."""
        return Requirements(base_weights=True)

    def prepare(self, context: Context) -> None:
        """Compute C of every layer in scope."""
        chosen = self.share > 0 or self.threshold is not None
        self._layers = list(directed(context, self.modules, self.mode, self.rank)) if chosen else []
        self._projected: dict[str, dict[str, float]] = {}

    @torch.no_grad()
    def settle(self, model: Any) -> None:
        """Project the chosen updates; those of adapters by their factor B."""
        found = []
        self._projected = {}
        for layer in self._layers:
            update = layer.update
            if not update.any():  # frozen: nothing to project
                continue
            kept = layer.matrix @ update
            cosine = float(cosine_similarity(kept.flatten(), update.flatten(), dim=0))
            found.append((cosine, layer, float(kept.norm() / update.norm())))
        found.sort(key=lambda entry: entry[0])
        if self.threshold is None:
            found = found[: round(self.share * len(found))]
        else:
            found = [entry for entry in found if entry[0] <= self.threshold]
        for cosine, layer, ratio in found:
            matrix = torch.zeros_like(layer.matrix) if self.control == "zero" else layer.matrix
            factor = layer.linear.left
            if factor is None:
                layer.linear.weight.copy_(layer.start + matrix @ layer.update)
            else:
                factor.copy_(matrix @ factor)
            self._projected[layer.linear.name] = {"cosine": cosine, "norm_kept": ratio}

    def summary(self) -> dict[str, Any]:
        """Return cosine, and the share of the norm that C keeps, of every projected matrix."""
        return {"safelora_projected": self._projected}
