"""SPPFT (Li et al. 2025, "Safety Layers in Aligned LLMs"): a block of middle layers stays as it was.

Fidelity: variant. The method is exact (every parameter of the block is frozen); the block is given as relative
depths, after the range that is reported for Llama-2-7B-chat (layers 6 to 14 of 32; from memory, 0- or 1-based is not
settled) or tuned, not located by the authors' over-rejection search. A block of equal size elsewhere is the fair
control.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from cwac_lab.core.errors import ConfigError
from cwac_lab.defenses.interface import Context, Defense
from cwac_lab.models.sites import decoder_layers, depth_to_layer


@dataclass
class SPPFT(Defense):
    """Freeze a contiguous block of decoder layers.

    Attributes:
        block: Relative depths [from, to) in [0, 1] of the block; equal ones freeze nothing.
    """

    block: list[float] = field(default_factory=lambda: [0.1875, 0.46875])

    precedence: ClassVar[int] = 0

    def __post_init__(self) -> None:
        """Check the field."""
        if len(self.block) != 2 or not 0 <= self.block[0] <= self.block[1] <= 1:
            raise ConfigError("block", list(self.block), "two relative depths, 0 <= from <= to <= 1")

    def prepare(self, context: Context) -> None:
        """Freeze the block."""
        layers = decoder_layers(context.model)
        first, end = (len(layers) if depth == 1 else depth_to_layer(depth, len(layers)) for depth in self.block)
        self._frozen = list(range(first, end))
        for index in self._frozen:
            layers[index].requires_grad_(False)

    def summary(self) -> dict[str, object]:
        """Return the frozen layers (0-based)."""
        return {"frozen_layers": self._frozen}
