"""A guard ends a training, goes back, or replays refusals, where a divergence is too large; also in a resumed run."""

import pytest
import torch

from cwac_lab.core.errors import ConfigError, Diverged
from cwac_lab.defenses.cwac.weight import WeightConstraint
from cwac_lab.defenses.interface import Composite
from cwac_lab.training.guard import Guard
from cwac_lab.training.settings import GuardConfig
from support import tiny
from support.defenses import ACTIVE
from support.held import Kill, Killed, same, train, weights

STEPS = 12  # 24 rows, twice, four at a time


class Says:
    """Says what divergence a model has, look by look, and remembers the weights that it was asked about."""

    def __init__(self, *values):
        self.values, self.seen = list(values), []

    def __call__(self, model):
        self.seen.append(weights(model))
        return self.values[len(self.seen) - 1]


def guard(where, look, **fields):
    chat = tiny.chat()
    refusals = [chat.encode(f"request {i}", "I can't help with that.") for i in range(5)]
    return Guard(
        GuardConfig(**{"kl": 0.5, "every_n_steps": 3} | fields), look, refusals, chat.pad_id, 0, where / "guard"
    )


def guarded(where, look, *more, defense=None, checkpoint=None, **fields):
    built = guard(where, look, **fields)
    settings = {"epochs": 2, "checkpoint": checkpoint, "checkpoint_every_n_steps": 1 if checkpoint else 0}
    model, _ = train(defense or Composite(), callbacks=[built, *more], **settings)
    return model, built


def test_a_guard_that_has_nothing_to_do_changes_nothing(tmp_path):
    plain, _ = train(Composite(), epochs=2)
    for do in ("stop", "rollback", "replay"):
        model, built = guarded(tmp_path, Says(0.1, 0.2, 0.3, 0.5), do=do)
        assert same(weights(model), weights(plain))
        found = built.facts()
        assert found["looks"] == [[3, 0.1], [6, 0.2], [9, 0.3], [12, 0.5]]
        assert (found["ended"], found["rolled_back_to"], found["replays"]) == (None, None, 0)


def test_training_ends_where_it_is_stopped(tmp_path):
    look = Says(0.1, 0.6)
    model, built = guarded(tmp_path, look, do="stop")
    assert same(weights(model), look.seen[1])
    assert built.facts() | {"looks": None} == {
        "kl": 0.6, "looks": None, "replays": 0, "ended": 6, "rolled_back_to": None
    }  # fmt: skip


@pytest.mark.parametrize(("values", "back"), [((0.1, 0.2, 0.9), 6), ((0.1, 0.2, 0.3, 0.9), 9), ((0.9,), 0)])
def test_a_rollback_puts_the_weights_of_the_last_look_within_back(values, back, tmp_path):
    look = Says(*values)
    model, built = guarded(tmp_path, look, do="rollback")
    expected = weights(tiny.model()) if back == 0 else look.seen[back // 3 - 1]
    assert same(weights(model), expected)
    found = built.facts()
    assert (found["rolled_back_to"], found["ended"]) == (back, 3 * len(values))


def test_a_rollback_takes_a_constraint_back_as_well(tmp_path):
    """A slowed tail remembers the weights of its last step: those of the look, too."""
    defense = WeightConstraint(energy=0.7, tail="slowed", restore_every_n_steps=3)
    look = Says(0.1, 0.9)
    model, _ = guarded(tmp_path, look, defense=defense, do="rollback")
    moved = [(value - look.seen[0][name]).abs().max() for name, value in weights(model).items()]
    assert max(moved) < 1e-6
    assert defense.leak() < 1e-5


class Rows(Kill):
    """Remembers the rows of every step; ``Kill`` ends the run after a batch."""

    def __init__(self, batch=None):
        super().__init__(batch)
        self.seen = {}

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.seen[module.step] = module.rows(module.step, batch)["input_ids"]


def test_a_replay_takes_the_place_of_some_steps(tmp_path):
    rows, plain = Rows(), Rows()
    train(Composite(), epochs=2, callbacks=[plain])
    _, built = guarded(tmp_path, Says(0.1, 0.9, 0.1, 0.9), rows, do="replay", replay_steps=2)
    changed = [step for step in range(STEPS) if not torch.equal(rows.seen[step], plain.seen[step])]
    assert changed == [6, 7]
    text = tiny.chat().decode(rows.seen[6][0].tolist())
    assert "request" in text
    assert "I can't help with that." in text
    found = built.facts()
    assert (found["replays"], found["ended"]) == (1, None)


@pytest.mark.parametrize("do", ["rollback", "replay"])
@pytest.mark.parametrize("killed", [4, 6])
def test_a_resumed_run_goes_on_as_if_it_had_not_been_stopped(do, killed, tmp_path):
    values = (0.1, 0.9, 0.2, 0.2)
    whole, built = guarded(tmp_path / "whole", Says(*values), do=do, checkpoint=tmp_path / "whole" / "checkpoint")
    first, second = Says(*values), Says(*values)
    where = tmp_path / "resumed"
    ended = do == "rollback" and killed == 6  # after 6 steps nothing is left to kill
    if not ended:
        with pytest.raises(Killed):
            guarded(where, first, Kill(killed), do=do, checkpoint=where / "checkpoint")
        second.seen = list(first.seen)
    model, again = guarded(where, second, do=do, checkpoint=where / "checkpoint")
    assert same(weights(model), weights(whole))
    assert again.facts() == built.facts()


@pytest.mark.parametrize("do", ["stop", "rollback"])
@pytest.mark.parametrize("every", [1, 5])
def test_a_run_that_was_killed_after_its_guard_ended_it_ends_there_again(do, every, tmp_path):
    """Once more with the checkpoint and the guard's folder that there are, as while the answers are made."""
    settings = {"epochs": 2, "checkpoint": tmp_path / "checkpoint", "checkpoint_every_n_steps": every}
    models, facts = [], []
    for values in ((0.1, 0.9), (0.9,) if every == 5 else ()):
        built = guard(tmp_path, Says(*values), do=do)
        models.append(train(Composite(), callbacks=[built], **settings)[0])
        facts.append(built.facts())
    assert same(weights(models[0]), weights(models[1]))
    assert facts[0] == facts[1]
    assert facts[0]["ended"] == 6


def test_a_run_that_was_killed_after_its_last_step_knows_what_its_guard_did(tmp_path):
    settings = {"epochs": 2, "checkpoint": tmp_path / "checkpoint", "checkpoint_every_n_steps": 3}
    facts = []
    for values in ((0.1, 0.9, 0.1, 0.2), ()):
        built = guard(tmp_path, Says(*values), do="replay")
        train(Composite(), callbacks=[built], **settings)
        facts.append(built.facts())
    assert facts[0] == facts[1]
    assert facts[0]["replays"] == 1


def test_what_is_looked_at_are_the_weights_as_they_are_used(tmp_path):
    """Between two restorations trained weights move along what is held."""
    defense = WeightConstraint(energy=0.9, projection="both", restore_every_n_steps=100)
    look = Says(0.1, 0.1, 0.1, 0.1)
    model, _ = guarded(tmp_path, look, defense=defense)
    assert same(look.seen[-1], weights(model))


@pytest.mark.parametrize("name", ACTIVE)
def test_a_replay_goes_with_every_defence(name, tmp_path):
    built = guard(tmp_path, Says(0.9, 0.1), do="replay", every_n_steps=4)
    train(ACTIVE[name](), callbacks=[built], others=built.refusals, epochs=1)
    assert built.facts()["replays"] == 1


def test_a_divergence_that_is_no_number_ends_the_run(tmp_path):
    with pytest.raises(Diverged, match="not finite after step 3"):
        guarded(tmp_path, Says(float("nan")))


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"kl": 0.0}, "kl"),
        ({"do": "panic"}, "do"),
        ({"do": "replay", "replay_steps": 4, "every_n_steps": 3}, "replay_steps"),
    ],
)
def test_bad_settings_of_a_guard_are_one_line(fields, key):
    with pytest.raises(ConfigError, match=key):
        GuardConfig(**fields)


@pytest.mark.parametrize("do", ["stop", "rollback"])
def test_where_nothing_is_replayed_every_step_may_be_looked_at(do):
    assert GuardConfig(kl=0.05, do=do, every_n_steps=1).every_n_steps == 1
