"""Orthogonal subspace fine-tuning (Nayak et al. 2025, arXiv 2504.07097): updates avoid a weight's leading directions.

Of ``W_0 = U S V^T`` the leading k singular directions stay: ``dW = (I - U_k U_k^T) dW (I - V_k V_k^T)``. So what is
protected is what the weight does most to any input, where the weight constraint protects the inputs of refused
prompts.

Fidelity: variant. PEFT's ``OSFConfig`` trains the factors of the rest and projects their gradients; the update lies in
the same space as long as the optimizer leaves it there, which AdamW does not. Here weights train, gradients are
projected, and the update as well. With ``tuning=lora`` both factors are projected, so the update is in that space too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from cwac_lab.core import linalg
from cwac_lab.core.errors import LabError, in_range, one_of
from cwac_lab.defenses.interface import Context, Defense, Requirements
from cwac_lab.models.adapters import held_weight, when_merged
from cwac_lab.models.sites import SCOPES, Matrix, linears


@dataclass
class _Held:
    """A matrix with its leading directions, U_k (m, k) and V_k (d, k), and W_0 (m, d) where it trains itself."""

    linear: Matrix
    left: Float[Tensor, "m k"]
    right: Float[Tensor, "d k"]
    start: Float[Tensor, "m d"] | None
    leaked: float | None = None

    @classmethod
    def of(cls, linear: Matrix, share: float) -> _Held:
        if linear.site.expert is not None and linear.adapter is not None:
            raise LabError(f"{linear.name} holds experts, whose adapters share factors (accepted: tuning=full)")
        weight = held_weight(linear)
        k = int(share * min(weight.shape))
        left, _, right = torch.linalg.svd(weight, full_matrices=False)
        trains = linear.adapter is None and linear.parameter.requires_grad
        return cls(linear, left[:, :k].contiguous(), right[:k].T.contiguous(), weight if trains else None)

    def rows(self, matrix: Float[Tensor, "r d"]) -> Float[Tensor, "r d"]:
        """Return ``M (I - V_k V_k^T)``."""
        return linalg.remove_span(matrix.float(), self.right)

    def columns(self, matrix: Float[Tensor, "m c"]) -> Float[Tensor, "m c"]:
        """Return ``(I - U_k U_k^T) M``."""
        return linalg.remove_span(matrix.float().T, self.left).T

    def gradient(self) -> None:
        """Project the gradient of what trains."""
        if self.start is not None:
            if self.linear.parameter.grad is not None:
                gradient = self.linear.of(self.linear.parameter.grad)
                gradient.copy_(self.columns(self.rows(gradient)))
            return
        for factor, project in self._factors():
            if factor.grad is not None:
                factor.grad.copy_(project(factor.grad))

    def weight(self) -> None:
        """Project the update, or its factors."""
        if self.start is not None:
            weight = self.linear.weight
            weight.copy_(self.start + self.columns(self.rows(weight.float() - self.start)))
            return
        for factor, project in self._factors():
            factor.copy_(project(factor))

    def leak(self, update: Float[Tensor, "m d"]) -> float:
        """Return the norm of the part of an update that is along what is protected, relative to the update's."""
        along = update.float() - self.columns(self.rows(update))
        return float(along.norm() / update.float().norm()) if update.any() else 0.0

    def merged(self, before: Tensor, after: Tensor) -> None:
        """Take a weight before and after its adapter is merged."""
        self.leaked = self.leak(after.float() - before.float())

    def _factors(self) -> Any:
        adapter = self.linear.adapter
        if adapter is None or adapter.merged:
            return
        (key,) = adapter.active_adapters
        yield adapter.lora_B[key].weight, self.columns
        yield adapter.lora_A[key].weight, self.rows


@dataclass
class OSF(Defense):
    """Keep updates out of the leading singular directions of the weights.

    Attributes:
        share: Share of the directions of a matrix that is protected, of the shorter side; 0 switches it off. PEFT's
            default is 0.5.
        modules: Scope of linear layers; what is outside trains freely.
    """

    share: float = 0.5
    modules: str = "all_linear"

    precedence: ClassVar[int] = 1

    def __post_init__(self) -> None:
        """Check the fields."""
        in_range("share", self.share, 0, 1)
        one_of("modules", self.modules, SCOPES)
        self._held: list[_Held] = []

    @property
    def copies(self) -> float:
        """The start, and of a square matrix twice the share as directions."""
        return 1 + 2 * self.share if self.share else 0.0

    @property
    def holds_outputs(self) -> bool:
        """By the left directions."""
        return self.share > 0

    @property
    def shardable(self) -> bool:
        """Weights and gradients are projected whole."""
        return False

    @property
    def settles_factors(self) -> bool:
        """After they are merged there is nothing to project."""
        return True

    @property
    def requirements(self) -> Requirements:
        """Weights that hold what a projection leaves."""
        return Requirements(exact_projection=True)

    @torch.no_grad()
    def prepare(self, context: Context) -> None:
        """Take the directions; factors that were drawn are projected, which moves no output while B is zero."""
        if self.share:
            self._held = [_Held.of(linear, self.share) for linear in linears(context.model, self.modules)]
        for held in self._held:
            if held.linear.adapter is not None:
                when_merged(held.linear.adapter, held.merged)
        self._project()

    @torch.no_grad()
    def after_backward(self, step: int) -> None:
        """Project the gradients."""
        for held in self._held:
            held.gradient()

    def after_optimizer_step(self, step: int) -> None:
        """Project what moved."""
        self._project()

    def settle(self, model: Any) -> None:
        """Project what another part has put in the place of the weights; what is projected stays as it is."""
        self._project()

    @torch.no_grad()
    def _project(self) -> None:
        for held in self._held:
            held.weight()

    @torch.no_grad()
    def summary(self) -> dict[str, Any]:
        """Return how many directions are protected, of every matrix, and the largest leak of what was trained."""
        for held in self._held:
            if held.start is not None:
                held.leaked = held.leak(held.linear.weight.float() - held.start)
        ranks = {f"{held.linear.site.name} {held.linear.name}": held.left.shape[1] for held in self._held}
        leaks = [held.leaked for held in self._held if held.leaked is not None]
        return {"osf_rank": ranks, **({"osf_leak": max(leaks)} if leaks else {})}
