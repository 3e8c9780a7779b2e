"""EMA of weights (Kim et al. 2025, "Rethinking Safety in LLM Fine-tuning: An Optimization Perspective").

The average ``a <- decay a + (1 - decay) theta`` begins at the start and is taken after every optimizer step; it is what
is used in the end. After n steps the start has a share of ``decay^n`` in it.

Fidelity: variant. The rule is the standard one, and training goes on from the weights, not from their average. The
authors' decay was not at hand; ours is not tuned. With LoRA the factors are averaged, as they are trained. Projections
and other changes of an update at the end, by defences beside it, act on the average.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from cwac_lab.core.errors import in_range
from cwac_lab.defenses.interface import Context, Defense
from cwac_lab.models.chat import Encoded


@dataclass
class EMA(Defense):
    """Use an exponential moving average of the trained weights.

    Attributes:
        decay: Share of the average that is kept at a step; 0 switches it off.
    """

    decay: float = 0.99

    # Its average is there before parts beside it hold, slow or project what is used.
    precedence: ClassVar[int] = 0

    def __post_init__(self) -> None:
        """Check the field."""
        in_range("decay", self.decay, 0, 1)

    @property
    def copies(self) -> float:
        """The average."""
        return float(self.decay > 0)

    @property
    def shardable(self) -> bool:
        """Averages are kept whole."""
        return False

    @property
    def settles_once(self) -> bool:
        """Other weights than the last ones would be averaged over again."""
        return self.decay > 0

    @property
    def settles_factors(self) -> bool:
        """Factors of adapters are averaged."""
        return self.decay > 0

    def prepare(self, context: Context) -> None:
        """Remember the model."""
        self._model, self._steps = context.model, 0

    def begin(self, total_steps: int, examples: Sequence[Encoded]) -> None:
        """Let the average begin at the start."""
        named = self._model.named_parameters() if self.decay else ()
        self._average = {name: p.detach().float().clone() for name, p in named if p.requires_grad}

    @torch.no_grad()
    def after_optimizer_step(self, step: int) -> None:
        """Take the weights into the average."""
        self._steps = step + 1
        for name, parameter in self._model.named_parameters():
            if name in self._average:
                self._average[name].lerp_(parameter.float(), 1 - self.decay)

    @torch.no_grad()
    def settle(self, model: Any) -> None:
        """Put the average in the place of the weights, or of the factors of adapters that are not merged yet."""
        for name, parameter in self._model.named_parameters():
            if name in self._average:
                parameter.copy_(self._average[name])

    def summary(self) -> dict[str, float]:
        """Return the share of the start in the average."""
        return {"ema_start_share": self.decay**self._steps}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the average and the number of steps."""
        held = {f"average/{name}": value for name, value in self._average.items()}
        return held | {"steps": torch.tensor(self._steps)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take them back."""
        self._steps = int(state["steps"])
        for name, average in self._average.items():
            average.copy_(state[f"average/{name}"])
