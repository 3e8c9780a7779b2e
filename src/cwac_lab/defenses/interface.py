"""The one interface of the bench: a defence is a small object with optional hooks on one shared training loop.

The default of every hook does nothing, so defences compose. Hooks are handed loaded objects; they load no files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from cwac_lab.data.mixing import TrainRow
from cwac_lab.defenses.cwac.sae.latents import FeatureSpec, LayerFeatures
from cwac_lab.defenses.cwac.subspace.spec import Subspace, SubspaceSpec
from cwac_lab.models.answers import Batch
from cwac_lab.models.chat import ChatFormat, Encoded

T = TypeVar("T")
# Reference prompts that a constraint can hold on to: the harmful ones, or benign ones as well.
HELD_ON = ("harmful", "both")


@dataclass(frozen=True)
class Requirements:
    """What must be prepared before a defence can start; None and False mean not needed.

    With ``whole_update`` it settles weights, and cannot settle factors of adapters: these must be merged before. With
    ``exact_projection`` or ``float32_weights`` weights that train in bfloat16 would round away what it puts there.
    """

    reference_prompts: bool = False
    exact_projection: bool = False
    subspace: SubspaceSpec | None = None
    features: FeatureSpec | None = None
    base_weights: bool = False
    own_refusals: bool = False
    whole_update: bool = False
    float32_weights: bool = False

    @property
    def alignment_refusals(self) -> bool:
        """Whether refusals of the alignment pool are used: an autoencoder is trained on them, nothing else is."""
        return self.features is not None

    def merge(self, other: Requirements) -> Requirements:
        """Return what two defences need together (each artefact is asked for by at most one of them)."""
        return Requirements(*(getattr(self, each.name) or getattr(other, each.name) for each in fields(self)))


@dataclass(frozen=True)
class Context:
    """What ``prepare`` is handed: the loaded model at its start, and what the defence asked for.

    Attributes:
        model: The start model.
        seed: Seed of the run.
        chat: Chat format of the model.
        start_weight: Reader of a start weight by parameter name.
        reference: Harmful reference prompts as token ids, up to where the answer starts, in all ``forms``.
        benign: Harmless reference prompts, likewise.
        refusals: The harmful reference prompts with refusals, as rows to train on: the one pool of refusal data.
        own_refusals: The start's own refusals to the harmful reference prompts as they stand, in their order: token
            ids, the prompt before.
        base_weight: Reader of a weight of the model before its alignment, where asked for.
        subspace: Directions of the weight constraint, where asked for.
        features: Encoders of the activation constraint, where asked for.
        autocast: Enters the precision that training computes in, so that values at the start compare with later ones.
    """

    model: Any
    seed: int
    chat: ChatFormat
    start_weight: Callable[[str], Tensor]
    reference: list[list[int]] = field(default_factory=list)
    benign: list[list[int]] = field(default_factory=list)
    refusals: list[TrainRow] = field(default_factory=list)
    own_refusals: list[list[int]] = field(default_factory=list)
    base_weight: Callable[[str], Tensor] | None = None
    subspace: Subspace | None = None
    features: tuple[LayerFeatures, ...] = ()
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass
class Defense:
    """Base of all defences; the fields of a subclass are its config keys, checked in ``__post_init__``.

    ``precedence`` orders the parts of a composition: what freezes (0), what changes weights (1), what runs the model
    (2), what penalises the weights themselves (3; so late that of a sharded model their gradients are there first),
    what bounds the update that all others leave (4).
    """

    precedence: ClassVar[int] = 2

    @property
    def shardable(self) -> bool:
        """Whether it works on a model whose weights are divided among processes."""
        return True

    @property
    def copies(self) -> float:
        """About how many copies of all that trains it keeps, in full tuning; a head or some matrices are none."""
        return 0.0

    @property
    def bounds_update(self) -> bool:
        """Whether it holds the size of an update, which what is done to weights after training could change."""
        return False

    @property
    def scales_rows(self) -> bool:
        """Whether it scales the rows of an update one by one."""
        return False

    @property
    def holds_outputs(self) -> bool:
        """Whether it holds what an update writes, so that its rows cannot be scaled one by one."""
        return False

    @property
    def settles_once(self) -> bool:
        """Whether ``settle`` would change settled weights, or put others in their place."""
        return False

    @property
    def settles_factors(self) -> bool:
        """Whether ``settle`` has to be called while adapters are not merged yet."""
        return False

    @property
    def requirements(self) -> Requirements:
        """What must be built before data and models are."""
        return Requirements()

    def prepare(self, context: Context) -> None:
        """Set up on the loaded model, before optimizers are built (freezing happens here)."""

    def wrap_dataset(self, rows: list[TrainRow]) -> list[TrainRow]:
        """Return the rows to train on."""
        return rows

    def begin(self, total_steps: int, examples: Sequence[Encoded]) -> None:
        """Learn how many optimizer steps the run has and all rows it trains on; the model is at its start.

        A resumed run calls it too, before its weights are put back.
        """

    def select_batch(self, step: int, batch: Batch) -> Batch:
        """Return the batch to train on at an optimizer step."""
        return batch

    def task_loss(self, model: Any, batch: Batch, step: int) -> Float[Tensor, ""] | None:
        """Return a loss of shape () that replaces cross-entropy, or None to keep it."""
        return None

    def loss_terms(self, model: Any, batch: Batch, step: int) -> dict[str, Float[Tensor, ""]]:
        """Return named terms of shape (), already weighted, that are added to the task loss; each is logged."""
        return {}

    def after_backward(self, step: int) -> None:
        """Change gradients, once an optimizer step, before clipping."""

    def after_optimizer_step(self, step: int) -> None:
        """Change weights, once an optimizer step."""

    def settle(self, model: Any) -> None:
        """Change the trained weights into those that are used: at the end, and for a copy that is saved before it.

        Adapters, where there are any, are merged or not. After such a copy the weights are put back.
        """

    def release(self, model: Any) -> None:
        """Undo what only training needs, at the end."""

    def after_training(self, model: Any) -> None:
        """Make the model what is exported and evaluated."""
        self.settle(model)
        self.release(model)

    def step_metrics(self, step: int) -> dict[str, float]:
        """Return figures to log for a finished step."""
        return {}

    def summary(self) -> dict[str, Any]:
        """Return JSON-able facts for the run record, after training."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state that an exact resume needs."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back what ``state_dict`` returned."""


def parts_of(defense: Defense) -> list[Defense]:
    """Return the parts of a defence, itself where it has none."""
    return list(defense.parts.values()) if isinstance(defense, Composite) else [defense]


def overrides(defense: Defense, *hooks: str) -> bool:
    """Tell whether a defence, or a part of it, has one of some hooks of its own."""
    parts = parts_of(defense)
    return any(getattr(type(part), hook) is not getattr(Defense, hook) for part in parts for hook in hooks)


def finish(defense: Defense, model: Any, merge: Callable[[], object]) -> None:
    """Make a trained model what is exported and evaluated; ``merge`` merges its adapters, where there are any."""
    for part in parts_of(defense):
        if part.settles_factors:
            part.settle(model)
    merge()
    defense.after_training(model)


@contextmanager
def settled(defense: Defense, model: Any) -> Iterator[None]:
    """Enter a context in which a model's trained weights are those that are used; afterwards they are as before."""
    if not overrides(defense, "settle"):
        yield
        return
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    held = [parameter.detach().clone() for parameter in trained]
    try:
        defense.settle(model)
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(trained, held, strict=True):
                parameter.copy_(value)


def _joined(parts: Iterable[dict[str, T]]) -> dict[str, T]:
    """Return one dict of several; two parts that use one name would hide each other, so that is an error."""
    total: dict[str, T] = {}
    for part in parts:
        shared = total.keys() & part.keys()
        if shared:
            raise ValueError(f"two parts of a composite defence both report {', '.join(sorted(shared))}")
        total |= part
    return total


@dataclass
class Composite(Defense):
    """Any number of defences at once (none: plain fine-tuning); hooks run in the order of precedence, then of names.

    Attributes:
        parts: The defences by name.
    """

    parts: dict[str, Defense] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Bring the parts into their order."""
        self.parts = dict(sorted(self.parts.items(), key=lambda named: (named[1].precedence, named[0])))

    @property
    def shardable(self) -> bool:
        """Whether all parts are."""
        return all(part.shardable for part in self.parts.values())

    @property
    def copies(self) -> float:
        """Those of all parts."""
        return sum(part.copies for part in self.parts.values())

    @property
    def requirements(self) -> Requirements:
        """All that the parts need."""
        total = Requirements()
        for part in self.parts.values():
            total = total.merge(part.requirements)
        return total

    def prepare(self, context: Context) -> None:
        """Prepare every part."""
        for part in self.parts.values():
            part.prepare(context)

    def wrap_dataset(self, rows: list[TrainRow]) -> list[TrainRow]:
        """Let the parts wrap in turn."""
        for part in self.parts.values():
            rows = part.wrap_dataset(rows)
        return rows

    def begin(self, total_steps: int, examples: Sequence[Encoded]) -> None:
        """Tell every part."""
        for part in self.parts.values():
            part.begin(total_steps, examples)

    def select_batch(self, step: int, batch: Batch) -> Batch:
        """Let the parts select in turn."""
        for part in self.parts.values():
            batch = part.select_batch(step, batch)
        return batch

    def task_loss(self, model: Any, batch: Batch, step: int) -> Float[Tensor, ""] | None:
        """Return the first replacement that a part offers, of shape ()."""
        offers = (part.task_loss(model, batch, step) for part in self.parts.values())
        return next((offer for offer in offers if offer is not None), None)

    def loss_terms(self, model: Any, batch: Batch, step: int) -> dict[str, Float[Tensor, ""]]:
        """Return the terms of all parts, each of shape ()."""
        return _joined(part.loss_terms(model, batch, step) for part in self.parts.values())

    def after_backward(self, step: int) -> None:
        """Let the parts act in turn."""
        for part in self.parts.values():
            part.after_backward(step)

    def after_optimizer_step(self, step: int) -> None:
        """Let the parts act in turn."""
        for part in self.parts.values():
            part.after_optimizer_step(step)

    def settle(self, model: Any) -> None:
        """Let the parts act in turn."""
        for part in self.parts.values():
            part.settle(model)

    def release(self, model: Any) -> None:
        """Let the parts act in turn."""
        for part in self.parts.values():
            part.release(model)

    def step_metrics(self, step: int) -> dict[str, float]:
        """Return the figures of all parts."""
        return _joined(part.step_metrics(step) for part in self.parts.values())

    def summary(self) -> dict[str, Any]:
        """Return the facts of all parts."""
        return _joined(part.summary() for part in self.parts.values())

    def state_dict(self) -> dict[str, Tensor]:
        """Return the parts' states under their names."""
        return {f"{name}.{key}": value for name, part in self.parts.items() for key, value in part.state_dict().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Hand each part its state."""
        for name, part in self.parts.items():
            prefix = f"{name}."
            part.load_state_dict({key[len(prefix) :]: v for key, v in state.items() if key.startswith(prefix)})
