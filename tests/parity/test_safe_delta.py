"""Safe Delta: which entries are kept, what compensates them, and the whole on a trained model."""

from __future__ import annotations

import pytest
import torch

from cwac_lab.core.errors import ConfigError
from cwac_lab.defenses.cwac.subspace import reading
from cwac_lab.defenses.literature import safe_delta
from cwac_lab.defenses.literature.safe_delta import SafeDelta, factor, restored
from support import tiny
from support.by_hand import REFUSALS, assert_equal, plain, sft, trained


@pytest.fixture
def layer():
    """A weight before and after training, and the inputs that are to give what they gave."""
    source = torch.Generator().manual_seed(3)
    inputs = torch.randn(40, 10, generator=source, dtype=torch.float64) @ torch.randn(10, 10, generator=source).double()
    start = torch.randn(6, 10, generator=source, dtype=torch.float64)
    return start, start + 0.1 * torch.randn(6, 10, generator=source, dtype=torch.float64), inputs


def by_hand(start, trained_, moment, strength, excluded, block, group):
    """The released procedure, entry by entry, with explicit inverses."""
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(len(moment))
    upper = torch.linalg.cholesky(torch.linalg.inv(damped)).T
    weight, rows, width = start.clone(), len(start), len(moment)
    chosen = torch.zeros_like(weight, dtype=torch.bool)
    for begin in range(0, width, block):
        columns = range(begin, min(begin + block, width))
        entries = [(1 / float(upper[j, j]) ** 2, j, i) for j in columns for i in range(rows)]
        price = sum(entry[0] for entry in entries) / len(entries)
        total = 0.0
        for cost, j, i in sorted(entries)[: len(entries) - int(excluded * len(entries))]:
            total += cost * float(trained_[i, j] - weight[i, j]) ** 2
            chosen[i, j] = total <= strength / 2 * rows / 4096 * price
        for first in range(begin, columns[-1] + 1, group):
            together = range(first, min(first + group, columns[-1] + 1))
            for i in range(rows):
                moved = {j: float(trained_[i, j] - weight[i, j]) for j in together if chosen[i, j]}
                for j, by in moved.items():
                    weight[i, j] += by
                    weight[i, together[-1] + 1 :] += by / upper[j, j] * upper[j, together[-1] + 1 :]
    return weight, chosen


@pytest.mark.parametrize(("strength", "excluded", "block"), [(30.0, 0.15, 10), (60.0, 0.0, 4), (5.0, 0.3, 8)])
def test_it_is_the_released_procedure(strength, excluded, block, layer, monkeypatch):
    monkeypatch.setattr(safe_delta, "BLOCK", block)
    start, after, inputs = layer
    moment = inputs.T @ inputs
    expected, chosen = by_hand(start, after, moment, strength, excluded, block, 4)
    assert 0 < chosen.sum() < chosen.numel()
    found, share = restored(start, after, factor(moment, 0.01), strength, excluded)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-8)
    assert share == pytest.approx(chosen.double().mean().item())


def test_column_by_column_it_is_the_least_change_of_outputs(layer):
    """With the cheapest column kept, and that is the first, the others move as least squares has it."""
    start, after, inputs = layer
    inputs[:, 0] *= 0.05
    moment = inputs.T @ inputs
    upper = factor(moment, 1e-12)
    found, share = restored(start, after, upper, None, 0.9, group=1)
    assert share == pytest.approx(0.1)
    given = (after - start)[:, :1]
    best = -given @ moment[:1, 1:] @ torch.linalg.inv(moment[1:, 1:])
    torch.testing.assert_close(found, start + torch.cat([given, best], 1), atol=1e-7, rtol=1e-5)


def test_nothing_and_everything_is_kept(layer):
    start, after, inputs = layer
    upper = factor(inputs.T @ inputs, 0.01)
    found, share = restored(start, after, upper, 0.0, 0.15)
    assert share == 0
    torch.testing.assert_close(found, start)
    found, share = restored(start, after, upper, None, 0.0)
    assert share == 1
    torch.testing.assert_close(found, after)


def test_inputs_that_are_always_zero_can_be_inverted():
    upper = factor(torch.diag(torch.tensor([4.0, 0.0, 2.0])), 0.01)
    torch.testing.assert_close(upper.T @ upper, torch.diag(1 / (torch.tensor([4.0, 1.0, 2.0]) + 0.07 / 3)).double())


@pytest.mark.parametrize("at_once", [1, 2**30])
def test_on_a_trained_model_layer_by_layer(at_once, monkeypatch):
    """Plain fine-tuning, then by hand what is kept of it, from inputs that hooks see; also a site at a time."""
    monkeypatch.setattr(reading, "MEMORY", at_once)
    passes, fill = [], safe_delta.fill
    monkeypatch.setattr(safe_delta, "fill", lambda held, *given: (passes.append(len(held)), fill(held, *given)))
    after, start, chat = plain(sft), tiny.model(), tiny.chat()
    layers = {f"{name}.weight": module for name, module in start.named_modules() if name.endswith("_proj")}
    seen = {name: [] for name in layers}
    for name, module in layers.items():
        module.register_forward_pre_hook(lambda _, args, at=name: seen[at].append(args[0][0].double()))
    with torch.no_grad():
        for row in REFUSALS:
            start(torch.tensor([chat.encode(row.prompt, row.response).input_ids]))
    expected = start.state_dict()
    for name, inputs in seen.items():
        x = torch.cat(inputs)
        found, _ = by_hand(expected[name].double(), after[name].double(), x.T @ x, 20.0, 0.15, 2048, 4)
        expected[name] = found.float()
    defense = SafeDelta(strength=20.0)
    assert_equal(trained(defense), expected)
    assert passes == ([1] * 8 if at_once == 1 else [8])  # four sites in each of two layers
    shares = defense.summary()["safe_delta_kept"]
    assert len(shares) == len(layers)
    assert 0 < min(shares.values()) < max(shares.values()) < 1


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"strength": -1.0}, "strength=-1.0: accepted: a number in"),
        ({"excluded": 1.5}, "excluded=1.5"),
        ({"damping": 0.0}, "damping=0.0"),
        ({"others": "none"}, "others=none: accepted: start | trained"),
    ],
)
def test_what_cannot_be_is_one_line(fields, line):
    with pytest.raises(ConfigError) as raised:
        SafeDelta(**fields)
    assert line in str(raised.value)
