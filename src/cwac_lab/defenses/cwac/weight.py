"""Weight constraint: updates stay in the safety subspace (CWAC, section on the weight constraint).

For a linear layer with inputs X on reference harmful prompts, ``C = X X^T``, the paper keeps updates in the span U of
the eigenvectors of small eigenvalues, ``dW <- dW U U^T``, so that ``dW X ~= 0``. Here the complement V (leading
eigenvectors, ``U U^T = I - V V^T``) is stored, or U where that has fewer columns. By default gradients are projected
and the *applied* update as well, because AdamW moves weights out of the subspace even when every gradient lies in it
(elementwise scaling, weight decay).
Gradients are projected where they arise, in the constrained layers; terms that reach a weight by another way (``l2``,
AsFT's, Lisa's proximal term) are caught by the update's projection only, so not at all with ``projection=gradient``.

With LoRA the factor A is projected, ``dW = alpha / r B A (I - V V^T)``: exact under any optimizer, nothing to restore,
and ``projection`` makes no difference. With ``tuning=null_space`` A is U^T and stays so.

In a mixture of experts every expert has a C of its own, of the tokens that are routed to it. One that no reference
token reaches has no V and is free. The router is in no scope: it is frozen with ``trainable=constrained``, else it
trains, and tokens may come to an expert that does not hold them.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from cwac_lab.core import linalg
from cwac_lab.core.errors import ConfigError, in_range, one_of
from cwac_lab.defenses.cwac.constrained import Constrained, note_merged
from cwac_lab.defenses.cwac.projected import (
    ProjectedLinear,
    project_factor,
    project_gradient_of,
    project_gradients,
    release,
    release_factor,
)
from cwac_lab.defenses.cwac.subspace.span import Span
from cwac_lab.defenses.cwac.subspace.spec import KindEnergies, SubspaceSpec
from cwac_lab.defenses.cwac.tail import TAILS, Tails
from cwac_lab.defenses.interface import HELD_ON, Context, Defense, Requirements
from cwac_lab.models.adapters import when_merged
from cwac_lab.models.answers import Batch
from cwac_lab.models.shards import is_sharded, local, rows, total
from cwac_lab.models.sites import SCOPES, Matrix, Site, linears

# What fields accept that name one of several ways.
_CHOICES = {
    "modules": SCOPES, "trainable": ("all", "constrained"), "projection": ("gradient", "update", "both"),
    "directions": ("leading", "random"), "factor_norm": ("projected", "kept"), "held_on": (*HELD_ON, "harmless"),
    "tokens": ("all", "no_sinks"), "opening": ("counted", "held"), "answers": ("none", "own"), "tail": TAILS,
}  # fmt: skip


@dataclass
class WeightConstraint(Defense):
    """Keep ``(W - W0) V = 0`` for the chosen linear layers.

    Attributes:
        modules: Scope; the paper's is ``ffn_out``.
        trainable: ``all`` as in the paper, or ``constrained``: freeze whatever is not constrained.
        projection: ``gradient`` (the paper's literal text), ``update`` (exact under any optimizer), or ``both``: exact,
            and the optimizer's moments and the clipping see only what is allowed (at a ``gradient_share`` of 1).
        energy: Share of the trace of C that is protected; exclusive with ``rank``.
        energy_by_kind: Another ``energy`` for kinds of sites.
        rank: Fixed number of protected directions, beside those of a held opening; 0 without a tail switches the
            constraint off.
        directions: Which are protected: the ``leading`` ones (the paper's), or as many ``random`` ones, drawn once for
            each site whatever the seed, beside those of a held opening: the control for their choice.
        held_on: Reference prompts whose directions are protected: ``harmful`` (the paper's), ``both`` kinds, or
            ``harmless`` ones alone: the control for the harmful ones, which are asked for all the same.
        tokens: ``all`` reference tokens, or ``no_sinks``.
        normalize: Unit-norm tokens in C.
        opening: The tokens that all reference prompts of a form begin with: ``counted`` as the others are (the
            paper's), or ``held`` to rounding, so that ``energy`` is of a prompt's own tokens.
        answers: Whether tokens of the start's own refusals count in C: ``none`` (the paper's), or ``own``. With
            ``data.reference=all`` they are refusals that the project wrote.
        closing_weight: What a token weighs in C that all prompts of a form end with; the first token of an answer is
            decided there.
        tail: What becomes of the directions behind the protected ones: ``free`` (the paper's), ``slowed``, or
            ``penalised`` (``cwac/tail.py``).
        tail_energy: Share of the trace up to which they count as the tail; what is behind it is free.
        tail_strength: How strongly they are held, s; a direction of mean energy is slowed by ``1 + s``.
        gradient_share: With ``both``, the share of the protected directions, the leading ones, that gradients are
            projected off; what the optimizer moves along the others is taken out where weights are restored. At low
            energies less of them costs less; at high ones all cost least. With LoRA all directions count.
        factor_norm: With LoRA, the norm that rows of A begin with: ``projected``, what is left of it, or ``kept``, as
            drawn. AdamW moves B alike whatever A is, so with a smaller A the weights move less.
        restore_every_n_steps: With ``both``, how often what moved along V is taken out, and once at the end; in
            between, what the optimizer moves along V stands, and the logged leak shows it. ``update`` does it always.
        leak_every_n_steps: How often the leak is computed (it reads the start weights); 0 leaves it to the end.
    """

    modules: str = "all_linear"
    trainable: str = "constrained"
    projection: str = "both"
    energy: float | None = 0.9999
    energy_by_kind: KindEnergies = field(default_factory=KindEnergies)
    rank: int | None = None
    directions: str = "leading"
    held_on: str = "harmful"
    tokens: str = "all"
    normalize: bool = True
    opening: str = "held"
    answers: str = "none"
    closing_weight: float = 1.0
    tail: str = "free"
    tail_energy: float = 0.9999
    tail_strength: float = 100.0
    gradient_share: float = 1.0
    factor_norm: str = "projected"
    restore_every_n_steps: int = 12
    leak_every_n_steps: int = 10

    precedence: ClassVar[int] = 1

    def __post_init__(self) -> None:
        """Check the fields."""
        for name, accepted in _CHOICES.items():
            one_of(name, getattr(self, name), accepted)
        if self.answers == "own" and self.held_on == "harmless":
            raise ConfigError("answers", self.answers, "none with held_on=harmless: there are no refusals to these")
        in_range("closing_weight", self.closing_weight, 0)
        in_range("tail_strength", self.tail_strength, 0)
        self._check_energy()
        if self.tail == "slowed" and self.projection == "gradient":
            raise ConfigError("tail", self.tail, "free or penalised with projection=gradient, which restores nothing")
        if self.has_tail and self.directions == "random":
            raise ConfigError("directions", self.directions, "leading beside a tail, which is what follows these")
        in_range("gradient_share", self.gradient_share, 0, 1, open_low=True)
        in_range("restore_every_n_steps", self.restore_every_n_steps, 1)
        in_range("leak_every_n_steps", self.leak_every_n_steps, 0)
        if self.gradient_share != 1 and self.projection != "both":
            raise ConfigError("gradient_share", self.gradient_share, "1 with a projection other than both")
        self._held: list[Constrained] = []
        self._tails = Tails(self.tail, self.tail_strength)
        self._hooks: list[RemovableHandle] = []
        self._removed = 0.0

    def _check_energy(self) -> None:
        if (self.energy is None) == (self.rank is None):
            raise ConfigError("rank", self.rank, "exactly one of constraint.energy and constraint.rank")
        if self.energy is not None:
            in_range("energy", self.energy, 0, 1, open_low=True)
        if self.rank is not None:
            in_range("rank", self.rank, 0)
        for kind, energy in asdict(self.energy_by_kind).items():
            if energy is None:
                continue
            if self.energy is None:
                raise ConfigError(f"energy_by_kind.{kind}", energy, "null with a fixed rank")
            if kind not in SCOPES[self.modules]:
                raise ConfigError(f"energy_by_kind.{kind}", energy, f"null with modules={self.modules}")
            in_range(f"energy_by_kind.{kind}", energy, 0, 1, open_low=True)
        of_kinds = [getattr(self.energy_by_kind, kind) or self.energy or 0 for kind in SCOPES[self.modules]]
        least = max(of_kinds) if self.has_tail else 0
        in_range("tail_energy", self.tail_energy, least, 1, open_low=True)

    @property
    def has_tail(self) -> bool:
        """Whether directions behind the protected ones are held at all."""
        return self.tail != "free" and self.tail_strength > 0

    @property
    def shardable(self) -> bool:
        """Where the tail is held, weights are read whole."""
        return not self.has_tail

    @property
    def copies(self) -> float:
        """What restores the weights: about one, less with a small fixed rank."""
        return float(self.projection != "gradient" and self.rank != 0)

    @property
    def settles_once(self) -> bool:
        """What moved along the tail is slowed, and would be slowed again."""
        return self.has_tail and self.tail == "slowed"

    @property
    def requirements(self) -> Requirements:
        """Reference prompts and the subspace of the chosen scope."""
        opening = "counted" if self.rank == 0 and not self.has_tail else self.opening
        spec = SubspaceSpec(
            self.modules, self.energy, self.rank, self.tokens, self.normalize, self.held_on,
            opening, self.answers, self.closing_weight, self.tail_energy if self.has_tail else None,
            self.energy_by_kind, self.directions, self.gradient_share != 1,
        )  # fmt: skip
        return Requirements(True, exact_projection=self.projection != "gradient", subspace=spec)

    def prepare(self, context: Context) -> None:
        """Take the bases, remember what restores the weights, and freeze the rest if asked to."""
        assert context.subspace is not None
        self._subspace = context.subspace
        groups: dict[str, list[Constrained]] = {}
        known: dict[tuple[Site, bool], Span] = {}  # of layers that read one input
        needs_order = self.gradient_share != 1
        for linear in linears(context.model, self.modules):
            adapted = linear.adapter is not None
            if (linear.site, adapted) not in known:
                span = context.subspace.spans[linear.site.name].to(context.model.device if adapted else linear.weight)
                known[linear.site, adapted] = Span.of(span.columns) if needs_order else span
            restores = self.projection != "gradient"
            self._held.append(Constrained.of(linear, known[linear.site, adapted], restores=restores))
            groups.setdefault(linear.name, []).append(self._held[-1])
        # Files hold the weights of experts under other names.
        self._start_weight, apart = context.start_weight, (group[0].linear for group in groups.values())
        self._copies = {
            linear.name: linear.parameter.detach().cpu().clone()
            for linear in apart
            if linear.site.expert is not None and linear.adapter is None and linear.parameter.requires_grad
        }
        if self.trainable == "constrained":
            # Other parts may have frozen some.
            trained = [parameter for held in self._held for parameter in held.linear.trained]
            context.model.requires_grad_(False)
            for parameter in trained:
                parameter.requires_grad_(True)
        self._moving = [held for held in self._held if held.moves]
        if self.has_tail:
            self._tails.take((held.linear for held in self._held), context.subspace)
        self._project(groups)

    def _project(self, groups: dict[str, list[Constrained]]) -> None:
        """Have factors projected, or gradients where they arise; of the groups each is of one parameter."""
        readers: dict[Site, list[Constrained]] = {}
        for group in groups.values():
            linear = group[0].linear
            if linear.adapter is not None:
                when_merged(linear.adapter, partial(note_merged, group))
                spans = [held.span for held in group]
                beside = [self._tails.beside(held.linear.site.name) for held in group]
                if any(span.rank for span in spans) or any(beside):
                    project_factor(linear.adapter, spans, beside, keep_norm=self.factor_norm == "kept")
            elif self.projection == "update":
                continue
            elif isinstance(linear.module, torch.nn.Linear):
                if group[0].moves:
                    readers.setdefault(linear.site, []).append(group[0])
            elif parts := [(held.linear, self._leading(held)) for held in group if held.moves]:
                self._hooks.append(project_gradient_of(linear.parameter, parts))
        for together in readers.values():
            project_gradients([held.linear.module for held in together], self._leading(together[0]))

    def _leading(self, held: Constrained) -> Span:
        """Return what gradients are projected off: the leading directions."""
        n = math.ceil(self.gradient_share * held.span.rank)
        if n == held.span.rank:
            return held.span
        return Span.of(self._subspace.spans[held.linear.site.name].to(held.linear.weight).columns[:, :n])

    def _restores(self, step: int) -> bool:
        if self.projection == "gradient" or not (self._moving or self._tails.slows):
            return False
        return self.projection == "update" or (step + 1) % self.restore_every_n_steps == 0

    def after_optimizer_step(self, step: int) -> None:
        """With ``projection=update`` or ``both``, take out of the weights what was moved along V, and slow the tail."""
        if self._restores(step):
            self._restore()
            self._tails.slow(keep=True)

    def loss_terms(self, model: Any, batch: Batch, step: int) -> dict[str, Float[Tensor, ""]]:
        """Return the penalty on the tail, of shape (), where it is penalised."""
        return self._tails.terms()

    def _restore(self) -> None:
        if not self._moving:
            return
        with torch.no_grad():
            removed = torch.stack([held.restore().square().sum() for held in self._moving]).sum()
            sharded = is_sharded(self._moving[-1].linear.weight)
            self._removed = float(total(removed, sharded=sharded).sqrt())

    def settle(self, model: Any) -> None:
        """Take out what was moved along V, and slow the tail."""
        if self.projection != "gradient":
            self._restore()
            self._tails.slow(keep=False)

    def release(self, model: Any) -> None:
        """Leave plain linear layers, and plain factors."""
        for hook in self._hooks:
            hook.remove()
        for held in self._held:
            if held.linear.adapter is not None:
                release_factor(held.linear.adapter)
            elif isinstance(held.linear.module, ProjectedLinear):
                release(held.linear.module)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights along slowed tails, as they were when these were slowed last."""
        return self._tails.state()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back what ``state_dict`` returned."""
        self._tails.load(state)

    def _start(self, linear: Matrix) -> Float[Tensor, "m d"]:
        name = linear.name
        return linear.of(self._copies[name] if name in self._copies else self._start_weight(name))

    @torch.no_grad()
    def leak(self) -> float:
        """Return ``||(W - W0) V||_F / ||W - W0||_F`` over all constrained matrices; 0 where nothing moved.

        With adapters ``W - W0`` is what they add, and once they are merged, what that left of it in float32.
        """
        sums = torch.zeros(2, dtype=torch.float64)
        weight: Tensor | None = None
        with parametrize.cached():  # all experts' factors are projected at once
            for held in self._held:
                if held.merged is not None:
                    sums += torch.tensor(held.merged, dtype=torch.float64)
                    continue
                factors = held.linear.factors()
                if factors is not None:
                    delta = linalg.product(*factors)
                else:
                    if not held.linear.parameter.requires_grad:
                        continue  # frozen from the beginning
                    weight = held.linear.weight
                    before = self._start(held.linear) if held.start is None else held.start
                    start = rows(weight, before).to(local(weight))
                    delta = local(weight).float() - start.float()
                sums += torch.tensor(held.span.leak(delta), dtype=torch.float64)
        if weight is not None and is_sharded(weight):
            sums = total(sums.to(weight.device), sharded=True)
        along, moved = sums.tolist()
        return (along / moved) ** 0.5 if moved else 0.0

    def step_metrics(self, step: int) -> dict[str, float]:
        """Return what was taken out of the weights where that was done (Frobenius norm), every n-th step the leak."""
        found = {"weight/removed": self._removed} if self._restores(step) else {}
        if self.leak_every_n_steps and (step + 1) % self.leak_every_n_steps == 0:
            found["weight/leak"] = self.leak()
        return found

    def summary(self) -> dict[str, Any]:
        """Return the leak at the end, the rank and the share of variance kept of every site."""
        return {
            "leak": self.leak(),
            "rank": {name: span.rank for name, span in self._subspace.spans.items()},
            "variance_kept": dict(self._subspace.energy),
        }
