import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from cwac_lab import linalg
from cwac_lab.subspace.basis import SubspaceSpec, second_moments

shapes = st.tuples(st.integers(2, 12), st.integers(2, 12), st.integers(0, 12), st.integers(0, 10_000))


def drawn(m, d, k, seed):
    source = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(d, d, generator=source, dtype=torch.float64))[0][:, : min(k, d)]
    return torch.randn(m, d, generator=source, dtype=torch.float64), basis, source


@given(shapes)
@settings(max_examples=60, deadline=None)
def test_projection_is_idempotent_and_equals_the_dense_one(shape):
    matrix, basis, _ = drawn(*shape)
    once = linalg.remove_span(matrix, basis)
    torch.testing.assert_close(linalg.remove_span(once, basis), once)
    dense = torch.eye(matrix.shape[1], dtype=torch.float64) - basis @ basis.T
    torch.testing.assert_close(once, matrix @ dense)


@given(shapes)
@settings(max_examples=60, deadline=None)
def test_restoring_on_the_span_equals_projecting_the_update(shape):
    start, basis, source = drawn(*shape)
    update = torch.randn(start.shape, generator=source, dtype=torch.float64)
    moved = start + update
    deviation = linalg.restore_on_span_(moved, basis, start @ basis)
    torch.testing.assert_close(moved, start + linalg.remove_span(update, basis))
    torch.testing.assert_close(deviation, update @ basis)
    along, total = linalg.leak(moved - start, basis)
    assert along <= 1e-24 * max(total, 1)


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.99, 1.0])
def test_eigenbasis_agrees_with_the_svd_of_the_activations(energy):
    x = np.random.default_rng(0).normal(size=(40, 12)) * np.geomspace(1, 1e-3, 12)
    basis, kept = linalg.leading_eigenbasis(torch.tensor(x.T @ x), energy=energy)
    _, singular, rows = np.linalg.svd(x, full_matrices=False)
    shares = np.cumsum(singular**2) / np.sum(singular**2)
    rank = int(np.searchsorted(shares, energy * (1 - 1e-12))) + 1
    assert basis.shape == (12, min(rank, 12))
    assert kept == pytest.approx(shares[basis.shape[1] - 1])
    assert kept >= energy * (1 - 1e-9)
    expected = rows[: basis.shape[1]].T @ rows[: basis.shape[1]]
    np.testing.assert_allclose((basis @ basis.T).numpy(), expected, atol=1e-7)


def test_energy_one_keeps_the_support_only():
    x = torch.randn(5, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    basis, kept = linalg.leading_eigenbasis(x.T @ x, energy=1.0)
    assert basis.shape == (20, 5)
    assert kept == pytest.approx(1.0)
    torch.testing.assert_close(x @ basis @ basis.T, x)


@pytest.mark.parametrize("arguments", [{}, {"energy": 0.5, "rank": 1}, {"energy": 0.0}, {"energy": 1.1}, {"rank": 4}])
def test_arguments_out_of_range_are_errors(arguments):
    with pytest.raises(ValueError, match=r"energy|rank"):
        linalg.leading_eigenbasis(torch.eye(3), **arguments)


def test_second_moments_equal_the_plain_product():
    model, chat = tiny.model(), tiny.chat()
    prompts = [chat.prompt_ids(prompt) for prompt in ("how do I", "tell me what", "one more of them, really")]
    for normalize, tokens in ((False, "all"), (True, "all"), (False, "no_sinks")):
        spec = SubspaceSpec("ffn_out", 0.9, None, tokens, normalize)
        found = second_moments(model, prompts, spec, chat.pad_id, batch_size=7)["layers.0.ffn_out"]
        rows = []
        for prompt in prompts:
            seen = []
            module = model.get_decoder().layers[0].mlp.down_proj
            handle = module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0][0]))
            with torch.no_grad():
                model(torch.tensor([prompt]))
            handle.remove()
            rows.append(seen[0][1:] if tokens == "no_sinks" else seen[0])
        x = torch.cat(rows).double()
        x = x / x.norm(dim=-1, keepdim=True) if normalize else x
        torch.testing.assert_close(found, x.T @ x, atol=1e-5, rtol=1e-4)
