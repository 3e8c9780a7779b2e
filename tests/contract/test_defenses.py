"""One table over all defences: what each must hold on a tiny model. A new defence is one row."""

from __future__ import annotations

import gc
from functools import cache
from itertools import compress, cycle

import pytest
import torch

from cwac_lab.data.batches import collate
from cwac_lab.defenses.cwac.weight import WeightConstraint
from cwac_lab.defenses.interface import Composite, Defense
from cwac_lab.defenses.literature.sppft import SPPFT
from cwac_lab.models.answers import answer_loss
from cwac_lab.training.checkpoint import Resume
from support import tiny
from support.cover import beyond, some, table
from support.defenses import ACTIVE, WAYS, ZERO
from support.held import FULL, LORA, ROWS, Kill, Killed, assert_moved_alike, context, same, train, weights


@cache
def plain(way):
    return weights(train(Defense(), **WAYS[way])[0])


@table(name=ZERO, way=WAYS)
def test_zero_strength_is_plain_fine_tuning_bit_for_bit(name, way):
    trained = weights(train(ZERO[name](), **WAYS[way])[0])
    assert same(trained, plain(way))
    assert not same(trained, weights(tiny.model()))


@table(turn=1, every=2, name=[name for name in ACTIVE if name != "none"], way=WAYS)
def test_an_active_constraint_changes_the_outcome(name, way):
    trained = weights(train(ACTIVE[name](), **WAYS[way])[0])
    assert not same(trained, plain(way))
    assert all(value.isfinite().all() for value in trained.values())


KEPT = {f"{how}-{name}": made for how, table in (("off", ZERO), ("on", ACTIVE)) for name, made in table.items()}


@pytest.mark.parametrize("name", KEPT)
def test_the_copies_that_it_keeps_are_those_that_it_tells(name):
    """Counted among all tensors that can be reached from it; a head, or matrices of attention, are less than a copy."""
    model, defense = tiny.model(), KEPT[name]()
    prepared = context(model, defense)
    own = {id(tensor) for tensor in reachable(prepared)}
    defense.prepare(prepared)
    defense.begin(3, [])
    kept = [tensor for tensor in reachable(defense) if id(tensor) not in own and not tensor.requires_grad]
    trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    found = sum(tensor.numel() for tensor in kept) / trained  # of the tiny model half are embeddings
    assert 0.4 * defense.copies <= found <= 1.25 * defense.copies + (0.65 if name.startswith("on-") else 0.02)


def reachable(root):
    """Return the tensors that can be reached from an object, through instances, containers and closures."""
    found, seen, left = [], set(), [root]
    while left:
        each = left.pop()
        if id(each) in seen or isinstance(each, type):
            continue
        seen.add(id(each))
        if isinstance(each, torch.Tensor):
            found.append(each)
        elif hasattr(each, "__dict__") or isinstance(each, dict | list | tuple | set):
            left += [next_ for next_ in gc.get_referents(each) if not isinstance(next_, type)]
    return found


# What is tuned, in how many pieces a step is taken, and the step of the checkpoint before the run is killed.
RESUMED = {"full": (FULL, 1, 6), "lora-accumulated": (LORA, 2, 3)}


@table(every=2, name=ACTIVE, way=RESUMED)
def test_a_resumed_run_continues_exactly(name, way, tmp_path):
    tuned, accumulate, saved = RESUMED[way]
    settings = {
        "tuning": tuned,
        "epochs": 2,
        "schedule": "cosine",
        "checkpoint_every_n_steps": 3,
        "accumulate": accumulate,
    }
    whole = weights(train(ACTIVE[name](), **settings)[0])
    folder = tmp_path / "checkpoint"
    with pytest.raises(Killed):
        train(ACTIVE[name](), **settings, checkpoint=folder, callbacks=[Kill(8)])
    assert Resume(folder).step == saved
    assert same(weights(train(ACTIVE[name](), **settings, checkpoint=folder)[0]), whole)


# Both change how a step is computed, not what a defence is: every defence is tuned in one way under the one and in the
# other under the other, and the fast set has it under one of the two, by turns in pairs.
CHECKPOINTED = list(zip(ACTIVE, cycle(["lora", "full"]), strict=False))
ACCUMULATED = list(zip(ACTIVE, cycle(["full", "lora"]), strict=False))
PAIRS = [place // 2 % 2 for place in range(len(ACTIVE))]


@pytest.mark.parametrize(("name", "way"), [*some(CHECKPOINTED, *compress(CHECKPOINTED, PAIRS)), *beyond(ACCUMULATED)])
def test_gradient_checkpointing_changes_rounding_only(name, way):
    settings = {**WAYS[way], "learning_rate": 1e-3}
    expected = weights(train(ACTIVE[name](), **settings)[0])
    model, _ = train(ACTIVE[name](), **settings, gradient_checkpointing=True)
    assert not model.model.layers[0].gradient_checkpointing
    assert_moved_alike(weights(model), expected, weights(tiny.model()))


@cache
def accumulated(name, way, pieces):
    """22 rows, 12 a step in so many pieces, so that the last step has 10."""
    settings = {**WAYS[way], "learning_rate": 1e-3, "rows": ROWS[:22]}
    return weights(train(ACTIVE[name](), **settings, batch_size=12 // pieces, accumulate=pieces)[0])


@pytest.mark.parametrize(
    ("name", "way"), [*some(ACCUMULATED, *compress(ACCUMULATED, (not each for each in PAIRS))), *beyond(CHECKPOINTED)]
)
def test_accumulation_changes_rounding_only(name, way):
    """Pieces of unequal size under the one, fewer in the last step under the other."""
    pieces = {"full": 4, "lora": 6}[way]
    assert_moved_alike(accumulated(name, way, pieces), accumulated(name, way, 1), weights(tiny.model()))


def test_gradient_checkpointing_keeps_less_for_the_backward_pass():
    kept = {}
    for checkpointing in (False, True):
        model, sizes = tiny.model(), []
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        batch = collate([tiny.chat().encode(*row) for row in ROWS], 0)

        def keep(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            answer_loss(model.train(), batch)
        kept[checkpointing] = sum(sizes)
    assert kept[True] < 0.3 * kept[False]


def test_hooks_are_called_once_an_optimizer_step():
    from dataclasses import dataclass

    @dataclass
    class Counted(Defense):
        def __post_init__(self):
            self.calls = []

        def loss_terms(self, model, batch, step):
            self.calls.append(("loss", step))
            return {}

        def after_backward(self, step):
            self.calls.append(("backward", step))

        def after_optimizer_step(self, step):
            self.calls.append(("step", step))

    defense = Counted()
    train(defense, rows=ROWS[:16], accumulate=2)
    assert defense.calls == [
        (hook, step) for step in range(2) for hook in ("loss", "loss", "backward", "step")
    ]  # fmt: skip


@pytest.mark.parametrize("names", [("sppft", "weight"), ("weight", "sppft")])
def test_a_frozen_block_stays_frozen_whatever_the_order(names):
    parts = {"sppft": SPPFT(block=[0.5, 1.0]), "weight": WeightConstraint(energy=0.5)}
    model, _ = train(Composite({name: parts[name] for name in names}))
    start = tiny.model().state_dict()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, start[name])}
    assert moved
    assert all(name.startswith("model.layers.0.") for name in moved)
