"""What is measured while a model is trained: when, and of which weights."""

from types import SimpleNamespace

import pytest
import torch

from cwac_lab.defenses.interface import Composite, Defense
from cwac_lab.diagnostics.callback import Sampler


class Doubled(Defense):
    """Uses twice the trained weights."""

    def settle(self, model):
        with torch.no_grad():
            model.weight.mul_(2)


def module(defense):
    """What a sampler sees of a run of eight steps, with what it logs."""
    made = SimpleNamespace(total_steps=8, step=0, model=torch.nn.Linear(3, 2), defense=defense, logged=[])
    made.log_figures = lambda *given: made.logged.append(given)
    return made


def test_the_last_step_is_sampled_once_and_earlier_samples_stay():
    def measure(_):
        calls.append(1)
        return {"harmful": {"kl": float(len(calls)), "said": [1]}}

    calls, trained, written = [], module(Composite()), []
    sampler = Sampler("drift", measure, 4, [], written.append)
    sampler.on_train_start(None, trained)
    for trained.step in range(1, 9):
        sampler.on_train_batch_end(None, trained)
    sampler.end(8, {"harmful": {"kl": 9.0}})
    assert len(calls) == 1
    assert trained.logged[3] == ("drift", {"drift/harmful/kl": 1.0})
    assert [(sample["step"], sample["harmful"]["kl"]) for sample in written[-1]] == [(4, 1.0), (8, 9.0)]
    resumed = Sampler("drift", measure, 4, written[-1], written.append)  # a run that was ended after its last step
    resumed.end(8, {"harmful": {"kl": 9.0}})
    assert [sample["step"] for sample in written[-1]] == [4, 8]


@pytest.mark.parametrize(("parts", "factor"), [({}, 1), ({"doubled": Doubled()}, 2)])
def test_what_is_measured_is_what_would_be_used_and_training_goes_on_from_what_was_trained(parts, factor):
    trained = module(Composite(parts))
    before = trained.model.weight.detach().clone()
    sampler = Sampler("seen", lambda model: {"norm": float(model.weight.detach().norm())}, 4, [], lambda samples: None)
    sampler.on_train_start(None, trained)
    trained.step = 4
    sampler.on_train_batch_end(None, trained)
    ((_, found),) = trained.logged
    assert found == {"seen/norm": pytest.approx(factor * float(before.norm()))}
    assert torch.equal(trained.model.weight, before)
