"""What a defence asks of the safety subspace, and what it is given."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from cwac_lab.defenses.cwac.subspace.span import Span


@dataclass
class KindEnergies:
    """Shares of the trace by kind of site (``Site.kind``), where they differ from that of all.

    Attributes:
        attn_in: At the inputs of q, k and v.
        attn_out: At the input of the attention's output layer.
        ffn_in: At the inputs of gate and up.
        ffn_out: At the input of down.
    """

    attn_in: float | None = None
    attn_out: float | None = None
    ffn_in: float | None = None
    ffn_out: float | None = None


@dataclass(frozen=True)
class SubspaceSpec:
    """What a defence asks of the safety subspace; also its cache key.

    Attributes:
        modules: Scope of linear layers, a key of ``SCOPES``.
        energy: Share of the trace that the protected directions hold, in (0, 1]; exclusive with ``rank``.
        rank: Fixed number of protected directions per site, beside those of a held opening.
        tokens: ``all`` tokens of the reference prompts, or ``no_sinks``.
        normalize: Scale each token's activation to unit norm, so that energy is not owned by outlier tokens.
        held_on: ``harmful`` reference prompts, ``both`` kinds, or ``harmless`` ones.
        opening: ``counted``: the tokens that all prompts of a form begin with count as the others do, in every prompt;
            ``held``: their directions are protected to rounding, and ``energy`` is of the other tokens.
        answers: ``none``, or ``own``: tokens of the start's own refusals count as well.
        closing_weight: Weight of the tokens that all prompts of a form end with, where the answer is decided.
        reach: Share of the trace up to which further directions are looked up, the tail behind the protected ones;
            None: none are.
        energy_by_kind: Another ``energy`` for kinds of sites.
        directions: ``leading``, or ``random``: as many drawn ones in their place, beside those of a held opening.
        ordered: Whether the protected directions are held themselves, in their order, however many they are.
    """

    modules: str
    energy: float | None
    rank: int | None
    tokens: str
    normalize: bool
    held_on: str = "harmful"
    opening: str = "counted"
    answers: str = "none"
    closing_weight: float = 1.0
    reach: float | None = None
    energy_by_kind: KindEnergies = field(default_factory=KindEnergies)
    directions: str = "leading"
    ordered: bool = False

    def energy_at(self, kind: str) -> float | None:
        """Return the share of the trace that is protected at a kind of site."""
        other = getattr(self.energy_by_kind, kind)
        return self.energy if other is None else other

    @property
    def weights(self) -> Float[Tensor, " P"]:
        """What a token of each part weighs in C (``parts.NAMES``); the opening nothing where it is held apart."""
        return torch.tensor([float(self.opening == "counted"), 1.0, self.closing_weight, 1.0], dtype=torch.float64)


@dataclass(frozen=True)
class Subspace:
    """What is held of the inputs of sites, each by its name.

    Attributes:
        spans: The protected directions.
        energy: The share of the trace that they hold.
        tails: The directions T behind them, shape (d_in, t), where a defence asks for them.
        shares: The share of the trace that each of T holds, shape (t,), falling.
    """

    spans: dict[str, Span]
    energy: dict[str, float]
    tails: dict[str, Float[Tensor, "d t"]] = field(default_factory=dict)
    shares: dict[str, Float[Tensor, " t"]] = field(default_factory=dict)
