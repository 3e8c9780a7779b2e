"""Lisa (Huang et al. 2024, "Lazy Safety Alignment"): alternate refusals and user data, each held near the other's end.

K1 steps on refusals with ``rho/2 ||theta - theta_user||^2``, then K2 steps on user data with
``rho/2 ||theta - theta_safe||^2``; the anchors are the weights where the other state was last left, at first the start.

Fidelity: exact in the two states, their order, the anchors and the discarded user batches of the safety state (so
that all methods take the same number of steps, and Lisa sees K2 / (K1 + K2) of the user data). ``warmup_share=0.1``
is what the released code does (the proximal term is off at first), 0 is the paper. With ``tuning=lora`` the distance
is that of the factors A and B, as in the authors' code. Deviations: K1 and K2 scaled to short runs (the code's 100
and 900 would not end one cycle), the bench's pool of refusals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from cwac_lab.core.errors import in_range
from cwac_lab.data.batches import in_place_of
from cwac_lab.defenses.interface import Context, Defense, Requirements
from cwac_lab.defenses.literature.l2 import squared_distance, start_copy
from cwac_lab.models.answers import Batch
from cwac_lab.models.chat import Encoded


@dataclass
class Lisa(Defense):
    """Bi-state optimisation with a proximal term.

    Attributes:
        safety_steps: K1, optimizer steps on refusals; 0 leaves user data only.
        user_steps: K2, optimizer steps on user data.
        strength: Weight of the proximal term, rho of the paper.
        warmup_share: Share of all steps at the beginning without the proximal term.
    """

    safety_steps: int = 1
    user_steps: int = 9
    strength: float = 1.0
    warmup_share: float = 0.1

    precedence: ClassVar[int] = 3

    def __post_init__(self) -> None:
        """Check the fields."""
        in_range("safety_steps", self.safety_steps, 0)
        in_range("user_steps", self.user_steps, 1)
        in_range("strength", self.strength, 0)
        in_range("warmup_share", self.warmup_share, 0, 1)

    @property
    def copies(self) -> float:
        """The two anchors."""
        return 2.0 * (self.strength > 0)

    @property
    def requirements(self) -> Requirements:
        """The refusals."""
        return Requirements(reference_prompts=self.safety_steps > 0)

    def prepare(self, context: Context) -> None:
        """Take the refusals; both anchors are the start."""
        self._model, self._seed, self._pad_id = context.model, context.seed, context.chat.pad_id
        self._refusals = [context.chat.encode(row.prompt, row.response) for row in context.refusals]
        self._anchors = {state: start_copy(context.model) for state in ("safe", "user")} if self.strength else {}
        self._switches = 0
        self._warmup, self._last_step = 0.0, -1

    def begin(self, total_steps: int, examples: Sequence[Encoded]) -> None:
        """Turn the share of warm-up into steps."""
        self._warmup, self._last_step = self.warmup_share * total_steps, total_steps - 1

    def state(self, step: int) -> str:
        """Return ``safe`` or ``user``: what is trained on at a step."""
        return "safe" if step % (self.safety_steps + self.user_steps) < self.safety_steps else "user"

    def select_batch(self, step: int, batch: Batch) -> Batch:
        """Return refusals in the safety state (the user batch is discarded), the user batch otherwise."""
        if self.state(step) == "user":
            return batch
        cycles, place = divmod(step, self.safety_steps + self.user_steps)
        turn = cycles * self.safety_steps + place
        return in_place_of(batch, self._refusals, turn, f"lisa/{self._seed}", self._pad_id)

    def loss_terms(self, model: Any, batch: Batch, step: int) -> dict[str, Float[Tensor, ""]]:
        """Return ``rho/2`` times the squared distance to the other state's anchor, of shape ()."""
        if not self._anchors or step < self._warmup:
            return {}
        other = "user" if self.state(step) == "safe" else "safe"
        return {"proximal": 0.5 * self.strength * squared_distance(model, self._anchors[other])}

    def after_optimizer_step(self, step: int) -> None:
        """Remember the weights of a state that is left, before the first step of the next one."""
        if self.state(step) == self.state(step + 1) or step == self._last_step:
            return
        self._switches += 1
        if self._anchors:
            self._anchors[self.state(step)] = start_copy(self._model)

    def summary(self) -> dict[str, int]:
        """Return how often the state changed."""
        return {"lisa_switches": self._switches}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the anchors and the number of switches."""
        held = {f"{state}/{name}": w for state, anchor in self._anchors.items() for name, w in anchor.items()}
        return held | {"switches": torch.tensor(self._switches)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take them back."""
        self._switches = int(state["switches"])
        for name, anchor in self._anchors.items():
            # What was frozen after this part was prepared is in its first anchors only.
            self._anchors[name] = {
                key: state[f"{name}/{key}"].to(value) for key, value in anchor.items() if f"{name}/{key}" in state
            }
