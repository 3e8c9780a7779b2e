"""Activation constraint: safety latents of a sparse autoencoder stay where they were (CWAC, eq. of L_safety).

    L_safety = 1/B sum_b || z_b(theta)[S] - z_b(theta_0)[S] ||^2,   L_total = L_task + lambda L_safety

With ``code=pre`` (default) z is the pre-activation of the chosen latents, which is affine in the residual x:
``z - z_0 = (x - x_0) W_enc[:, S]``. So the autoencoder chooses directions, and the penalty is a quadratic form of rank
at most ``|S|`` on the residual; it holds these directions also where the latent is silent. ``code=topk`` is the paper's
literal TopK-masked activation, which has no gradient for a latent that fell out of the top k. By default each latent
is divided by its standard deviation at the start, and the squares are averaged over latents, positions and prompts;
``scale=none reduction=sum`` is the paper's squared norm.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cwac_lab.core.errors import ConfigError, LabError, in_range, one_of
from cwac_lab.data.batches import cyclic, pad
from cwac_lab.defenses.cwac.sae.latents import FeatureSpec, LayerFeatures, topk_codes
from cwac_lab.defenses.interface import HELD_ON, Context, Defense, Requirements
from cwac_lab.models.answers import Batch, share
from cwac_lab.models.capture import layer_outputs, penalty_positions

# Reference prompts that one forward takes before fine-tuning.
TOGETHER = 16
SELECTIONS = ("mean_difference", "frequency_difference", "attribution", "random")


def encode(x: Float[Tensor, "N D"], features: LayerFeatures, code: str) -> Float[Tensor, "N S"]:
    """Return the chosen latents of residuals, in float32, also under autocast."""
    with torch.autocast(x.device.type, enabled=False):
        if code == "pre":
            return x.float() @ features.weight[:, features.latents] + features.bias[features.latents]
        return topk_codes(x.float(), features.weight, features.bias, features.k)[:, features.latents]


@dataclass
class ActivationConstraint(Defense):
    """Hold safety latents at their value before fine-tuning, on reference prompts.

    Attributes:
        strength: Lambda of the paper; 0 switches the constraint off.
        held_on: Reference prompts that the latents are held on: ``harmful`` (the paper's), or ``both`` kinds.
        depths: Relative depths of the layers whose output is encoded; the paper's is near 0.6.
        n_latents: Latents per layer, |S| in the paper.
        selection: Score of the latents, one of ``SELECTIONS``.
        code: ``pre`` or ``topk`` (the paper's literal).
        positions: ``all`` prompt tokens but sinks, or the ``last`` ``n_last``.
        n_last: How many last tokens.
        answer_tokens: With ``last``, how many first tokens of the start's own refusal besides (the paper's is 0).
            Prompts in other forms, harmless ones, and those that have to be cut for their answer have no such tokens.
            With ``data.reference=all`` the refusals are those of the project's list.
        scale: ``std`` divides each latent by its standard deviation before fine-tuning; ``none`` is the paper's.
        reduction: ``mean`` over the latents, or their ``sum`` (the paper's squared norm).
        batch_size: Reference prompts per penalty.
        every_n_steps: The penalty is computed every n-th step and multiplied by n. That keeps the mean of its gradient,
            not its effect: AdamW's scaling and the clipping see n-fold gradients on those steps and weaken them (by
            ``sqrt(n)`` to ``n`` where the penalty dominates), so strengths compare at equal n only.
    """

    strength: float = 10.0
    held_on: str = "harmful"
    depths: list[float] = field(default_factory=lambda: [0.94])
    n_latents: int = 100
    selection: str = "mean_difference"
    code: str = "pre"
    positions: str = "last"
    n_last: int = 5
    answer_tokens: int = 0
    scale: str = "std"
    reduction: str = "mean"
    batch_size: int = 4
    every_n_steps: int = 4

    def __post_init__(self) -> None:
        """Check the fields."""
        in_range("strength", self.strength, 0)
        if not self.depths or any(not 0 <= depth < 1 for depth in self.depths):
            raise ConfigError("depths", list(self.depths), "a list of relative depths in [0, 1)")
        one_of("held_on", self.held_on, HELD_ON)
        one_of("selection", self.selection, SELECTIONS)
        one_of("code", self.code, ("pre", "topk"))
        one_of("scale", self.scale, ("std", "none"))
        one_of("reduction", self.reduction, ("mean", "sum"))
        one_of("positions", self.positions, ("all", "last"))
        for key in ("n_latents", "n_last", "batch_size", "every_n_steps"):
            in_range(key, getattr(self, key), 1)
        in_range("answer_tokens", self.answer_tokens, 0)
        if self.answer_tokens and self.positions != "last":
            raise ConfigError("answer_tokens", self.answer_tokens, "0 with positions=all")
        self._features: tuple[LayerFeatures, ...] = ()

    @property
    def requirements(self) -> Requirements:
        """Reference prompts, and the autoencoders' directions at the chosen layers."""
        if self.strength == 0:
            return Requirements()
        spec = FeatureSpec(
            tuple(self.depths), self.n_latents, self.selection, self.positions, self.n_last, self.held_on
        )
        return Requirements(reference_prompts=True, features=spec, own_refusals=self.answer_tokens > 0)

    def prepare(self, context: Context) -> None:
        """Compute the latents of all reference prompts before fine-tuning, once."""
        device = context.model.device
        self._features = tuple(features.to(device) for features in context.features)
        self._reference = context.reference + (context.benign if self.held_on == "both" else [])
        self._n_held = [self.n_last] * len(self._reference)
        for row, text in enumerate(context.own_refusals if self.answer_tokens else []):
            known = len(self._reference[row])
            if text[:known] == self._reference[row]:  # else the prompt was cut to leave room for the answer
                self._reference[row] = text[: known + self.answer_tokens]
                self._n_held[row] += len(self._reference[row]) - known
        self._pad_id, self._seed = context.chat.pad_id, context.seed
        if not self._features:
            return
        self._start: list[list[Tensor]] = [[] for _ in self._reference]
        self._held: list[list[Tensor]] = [[] for _ in self._reference]
        by_length = sorted(range(len(self._reference)), key=lambda row: len(self._reference[row]))
        with torch.no_grad(), context.autocast():
            for at in range(0, len(by_length), TOGETHER):
                self._take(context.model, by_length[at : at + TOGETHER])

    def _take(self, model: Any, rows: list[int]) -> None:
        """Take the positions that are held in some reference prompts, each looked at alone, and their latents there."""
        ids, mask = (part.to(model.device) for part in pad([self._reference[row] for row in rows], self._pad_id))
        outputs = self._residuals(model, ids, mask)
        for features in self._features:
            for place, row in enumerate(rows):
                length = len(self._reference[row])
                x = outputs[features.layer][place : place + 1, :length]
                held = penalty_positions(x, mask[place : place + 1, :length], self.positions, self._n_held[row])[0]
                if not held.any():
                    raise LabError(f"a reference prompt of {length} tokens has no position to hold latents at")
                self._held[row].append(held)
                self._start[row].append(encode(x[0][held], features, self.code))

    def _residuals(self, model: Any, ids: Int[Tensor, "B T"], mask: Int[Tensor, "B T"]) -> dict[int, Tensor]:
        """Return the residual stream of shape (B, T, D) at the hooked layers."""
        return layer_outputs(model, [f.layer for f in self._features], ids, mask)

    def _rows(self, step: int) -> list[int]:
        """Return the reference prompts of a step: each pass over them is shuffled, and depends on the step alone."""
        turn = step // self.every_n_steps
        return cyclic(len(self._reference), self.batch_size, turn, f"reference/{self._seed}")

    def loss_terms(self, model: Any, batch: Batch, step: int) -> dict[str, Float[Tensor, ""]]:
        """Return ``lambda L_safety`` on some reference prompts, of shape (); nothing on steps that are left out."""
        if not self._features or step % self.every_n_steps:
            return {}
        rows, weight = share(self._rows(step), batch)
        ids, mask = pad([self._reference[row] for row in rows], self._pad_id)
        outputs = self._residuals(model, ids.to(model.device), mask.to(model.device))
        distances = []
        for index, features in enumerate(self._features):
            for place, row in enumerate(rows):
                held = self._held[row][index]
                now = encode(outputs[features.layer][place][: len(held)][held], features, self.code)
                distances.append(self._distance(now - self._start[row][index], features))
        return {"safety": self.strength * self.every_n_steps * weight * torch.stack(distances).mean()}

    def _distance(self, moved: Float[Tensor, "N S"], features: LayerFeatures) -> Float[Tensor, ""]:
        """Return the squared distance of one prompt's latents to their start: mean over its N positions, shape ()."""
        squares = (moved / features.scale if self.scale == "std" else moved).square()
        return squares.mean() if self.reduction == "mean" else squares.sum(-1).mean()

    def summary(self) -> dict[str, Any]:
        """Return the chosen latents of every layer."""
        return {"latents": {str(f.layer): f.latents.tolist() for f in self._features}}
