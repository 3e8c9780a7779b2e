"""Layers whose gradients are projected where they arise: by V or its complement, once for all that read one input."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cwac_lab.core import linalg
from cwac_lab.defenses.cwac import projected
from cwac_lab.defenses.cwac.projected import Projection, cheapest_order, project_gradients, release
from cwac_lab.defenses.cwac.subspace.span import Span


@pytest.mark.parametrize("n_tokens", [16, 128])
@pytest.mark.parametrize("directions", [8, 80])
def test_gradients_are_projected_in_float32_under_autocast(directions, n_tokens):
    """Most of a token lies along V; what is left of it after rounding to bfloat16 must be small beside the rest."""
    source = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(96, directions, generator=source)).Q
    tokens = torch.randn(n_tokens, directions, generator=source) @ basis.T
    tokens = 10 * tokens + torch.randn(n_tokens, 96, generator=source)
    layer = torch.nn.Linear(96, 64)
    project_gradients([layer], Span.of(basis))
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(tokens)
    gradient = torch.randn(out.shape, generator=source)
    (out.float() * gradient).sum().backward()
    assert (layer.weight.grad @ basis).norm() < 0.004 * layer.weight.grad.norm()
    exact = gradient.T.double() @ (tokens.double() @ (torch.eye(96).double() - (basis @ basis.T).double()))
    assert (layer.weight.grad - exact).norm() < 0.012 * exact.norm()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [4, 40])  # fewer and more than the layer has outputs
@pytest.mark.parametrize("directions", [3, 9, 12])  # the others are as many, or none
def test_a_projected_layer_has_projected_gradients(directions, tokens, bias):
    source = torch.Generator().manual_seed(0)
    plain, basis = torch.nn.Linear(12, 10, bias=bias), torch.linalg.qr(torch.randn(12, directions, generator=source)).Q
    held = copy.deepcopy(plain)
    project_gradients([held], Span.of(basis))
    held = copy.deepcopy(held)
    x = torch.randn(2, tokens // 2, 12, generator=source)
    grads = {}
    for name, layer in (("plain", plain), ("held", held)):
        inputs = x.clone().requires_grad_()
        layer(inputs).pow(3).sum().backward()
        grads[name] = [inputs.grad, *(parameter.grad for parameter in layer.parameters())]
    grads["plain"][1] = grads["plain"][1] - grads["plain"][1] @ basis @ basis.T
    for ours, expected in zip(grads["held"], grads["plain"], strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-5)
    assert held.state_dict().keys() == plain.state_dict().keys()
    with torch.autocast("cpu", torch.bfloat16):
        held.zero_grad()
        held(x).float().pow(3).sum().backward()
    assert (held.weight.grad - grads["plain"][1]).norm() <= 0.02 * grads["plain"][1].norm() + 1e-3
    release(held)
    assert type(held) is torch.nn.Linear
    torch.testing.assert_close(held(x), plain(x))


def site(rows, source, directions=3):
    """Return layers that read one input of width 12, projected off some directions, and the dense projector."""
    basis = torch.linalg.qr(torch.randn(12, directions, generator=source)).Q
    layers = [torch.nn.Linear(12, each, bias=False) for each in rows]
    project_gradients(layers, Span.of(basis))
    return layers, torch.eye(12) - basis @ basis.T


# Few and many tokens beside the layers' 24 outputs; then the directions that are protected, of 12.
@pytest.mark.parametrize(
    ("tokens", "directions", "order"),
    [(4, 3, "tokens"), (40, 3, "gradients"), (4, 9, "coordinates"), (4, 7, "tokens"), (400, 7, "coordinates")],
)
def test_layers_of_one_input_share_its_projection(tokens, directions, order, monkeypatch):
    """Every input is projected once, another one of the same site or of another anew, and so is memory written anew."""
    source = torch.Generator().manual_seed(0)
    sites = [site((12, 6, 6), source, directions) for _ in range(2)]
    calls, remove, product = [], linalg.remove_span, linalg.product
    monkeypatch.setattr(linalg, "remove_span", lambda *given: (calls.append(given[0].shape), remove(*given))[1])
    # Of the complement: what is multiplied by U.
    by = (12, 12 - directions)
    seen = lambda *given: (given[1].shape == by and calls.append(given[0].shape), product(*given))[1]  # noqa: E731
    monkeypatch.setattr(linalg, "product", seen)
    assert cheapest_order(tokens, 12, 24, min(directions, 12 - directions), free=directions > 6) == order
    shared = order != "gradients"

    def check(read, inputs, expected):
        """``read`` names the sites that read the inputs one after the other, each what the one before returned."""
        parts = []
        for x in inputs:
            for layers, projector in read:
                out = [layer(x) for layer in layers]
                for part in out:
                    part.retain_grad()
                parts += [(layer, part, x.detach().clone(), projector) for layer, part in zip(layers, out, strict=True)]
                x = out[0] * torch.cat(out[1:], -1)
            x.pow(2).sum().backward()
        for layer in {id(layer): layer for layer, *_ in parts}.values():
            sums = [part.grad.T @ before @ projector for each, part, before, projector in parts if each is layer]
            expected_gradient = sum(sums)
            assert (layer.weight.grad - expected_gradient).norm() < 1e-5 * expected_gradient.norm()
            layer.weight.grad = None
        assert len(calls) == (expected if shared else 3 * len(read) * len(inputs))
        calls.clear()

    x, other = torch.randn(tokens, 12, generator=source), torch.randn(tokens, 12, generator=source)
    check(sites, [x], 2)
    check(sites[:1], [x, other], 1)  # x is what was projected last
    check(sites[:1], [other], 0)
    other.copy_(x + 1)
    check(sites[:1], [other], 1)
    release(sites[0][0][0])
    assert Projection._last is None


@pytest.mark.parametrize(
    ("n", "width", "rows", "k", "order"),
    [
        # a sixth of SmolLM2's widths
        (50, 96, 160, 27, "tokens"),
        (680, 96, 160, 27, "gradients"),
        (50, 96, 512, 78, "coordinates"),
        (680, 96, 512, 78, "coordinates"),
        (50, 256, 96, 173, "tokens"),
        (680, 256, 96, 173, "gradients"),
        (16, 64, 64, 64, "coordinates"),
    ],
)
def test_the_order_of_products_is_the_one_with_fewest_multiplications(n, width, rows, k, order):
    """Counted by torch on the very products, in every order."""
    assert cheapest_order(n, width, rows, min(k, width - k), free=2 * k > width) == order
    counted = {}
    x, g = torch.randn(n, width), torch.randn(n, rows)
    basis = torch.linalg.qr(torch.randn(width, k)).Q
    for each in ("tokens", "gradients", "coordinates") if 2 * k > width else ("tokens", "gradients"):
        projection = Projection(Span.of(basis), 1, rows)
        with pytest.MonkeyPatch.context() as patch, FlopCounterMode(display=False) as counter:
            patch.setattr(projected, "cheapest_order", lambda *_, each=each, **__: each)
            found = projection.gradient(g, x)
        counted[each] = counter.get_total_flops()
        expected = g.T @ (x - x @ basis @ basis.T)
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    assert counted[order] == min(counted.values())
    # With few free directions the projected gradient takes fewer multiplications than the plain one.
    assert (counted[order] < 2 * n * width * rows) == (order == "coordinates")
