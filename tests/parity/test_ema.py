"""The moving average of weights: by its closed form, with factors, beside a projection, and where a run stops."""

from __future__ import annotations

import pytest
import torch

from cwac_lab.core.errors import ConfigError
from cwac_lab.defenses.cwac.weight import WeightConstraint
from cwac_lab.defenses.interface import Composite, Defense, settled
from cwac_lab.defenses.literature.ema import EMA
from support import tiny
from support.by_hand import assert_equal, plain, sft, trained
from support.held import LORA, train, weights


def averaged(path, decay):
    """Return ``decay^n theta_0 + (1 - decay) sum decay^(n - i) theta_i``, in float64."""
    n = len(path) - 1
    shares = [decay**n, *((1 - decay) * decay ** (n - i) for i in range(1, n + 1))]
    assert sum(shares) == pytest.approx(1)
    return {
        name: sum(share * each[name].double() for share, each in zip(shares, path, strict=True)).float()
        for name in path[0]
    }


@pytest.mark.parametrize("decay", [0.3, 0.9, 1.0])
def test_what_is_used_is_the_average_of_the_weights_of_all_steps(decay):
    path = [weights(tiny.model())]
    plain(sft, after=lambda model, step: path.append(weights(model)))
    assert len(path) == 5
    defense = EMA(decay=decay)
    assert_equal(trained(defense), averaged(path, decay))
    assert defense.summary() == {"ema_start_share": pytest.approx(decay**4)}


class Factors(Defense):
    """Keeps the factors of every step."""

    def prepare(self, context):
        self.path, self.named = [], [(n, p) for n, p in context.model.named_parameters() if p.requires_grad]
        self.after_optimizer_step(-1)

    def after_optimizer_step(self, step):
        self.path.append({name: parameter.detach().clone() for name, parameter in self.named})


def test_factors_are_averaged_before_they_are_merged():
    watched = Factors()
    found = weights(train(Composite({"ema": EMA(decay=0.5), "watched": watched}), tuning=LORA)[0])
    factors, start = averaged(watched.path, 0.5), weights(tiny.model())
    stems = {name.split(".lora_")[0] for name in factors}
    for stem in stems:
        (left,) = (value for name, value in factors.items() if name.startswith(f"{stem}.lora_B"))
        (right,) = (value for name, value in factors.items() if name.startswith(f"{stem}.lora_A"))
        update = LORA.alpha / LORA.rank * left @ right
        torch.testing.assert_close(found[f"{stem}.weight"], start[f"{stem}.weight"] + update, atol=1e-6, rtol=1e-5)
        assert update.norm() > 1e-4
    assert len(stems) > 3


@pytest.mark.parametrize("tuning", [{}, {"tuning": LORA}], ids=["full", "lora"])
def test_an_average_of_weights_that_leak_nothing_leaks_nothing(tuning):
    weight = WeightConstraint(energy=0.9, restore_every_n_steps=100)
    found = weights(train(Composite({"ema": EMA(decay=0.7), "weight": weight}), **tuning)[0])
    assert weight.summary()["leak"] < 1e-4
    alone = weights(train(WeightConstraint(energy=0.9, restore_every_n_steps=100), **tuning)[0])
    assert any((found[name] - alone[name]).abs().max() > 1e-4 for name in found)


def test_training_goes_on_from_the_weights_after_a_look_at_the_average():
    class Looks(Defense):
        def prepare(self, context):
            self.model = context.model

        def after_optimizer_step(self, step):
            before = weights(self.model)
            with settled(ema, self.model):
                assert not all(torch.equal(before[n], v) for n, v in weights(self.model).items())
            assert all(torch.equal(before[n], v) for n, v in weights(self.model).items())

    ema = EMA(decay=0.5)
    assert_equal(trained(Composite({"ema": ema, "looks": Looks()})), trained(EMA(decay=0.5)))


def test_a_decay_is_a_share():
    with pytest.raises(ConfigError, match=r"decay=1.5: accepted: a number in \[0, 1\]"):
        EMA(decay=1.5)
