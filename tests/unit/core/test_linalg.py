import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from cwac_lab.core import linalg
from cwac_lab.defenses.cwac.subspace import basis, coverage, reading
from cwac_lab.defenses.cwac.subspace.solvers import Covariance, Gram, Randomized, cheapest
from cwac_lab.defenses.cwac.subspace.spec import SubspaceSpec
from cwac_lab.defenses.cwac.weight import WeightConstraint
from cwac_lab.models.sites import linears
from support import tiny
from support.held import FULL, LORA, ROWS, train

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
def test_the_complement_projects_as_the_dense_one_does(shape):
    _, basis, _ = drawn(*shape)
    width, k = basis.shape
    free = linalg.complement(basis)
    assert free.shape == (width, width - k)
    torch.testing.assert_close(free @ free.T, torch.eye(width, dtype=torch.float64) - basis @ basis.T)


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


@given(shapes)
@settings(max_examples=60, deadline=None)
def test_restoring_by_the_complement_is_restoring_on_the_span(shape):
    start, basis, source = drawn(*shape)
    moved = start + torch.randn(start.shape, generator=source, dtype=torch.float64)
    other = moved.clone()
    removed = linalg.restore_off_free_(moved, linalg.complement(basis), start)
    deviation = linalg.restore_on_span_(other, basis, start @ basis)
    torch.testing.assert_close(moved, other)
    torch.testing.assert_close(removed, deviation @ basis.T)


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.99, 1.0])
def test_eigenbasis_agrees_with_the_svd_of_the_activations(energy):
    x = np.random.default_rng(0).normal(size=(40, 12)) * np.geomspace(1, 1e-3, 12)
    basis, kept = linalg.leading_eigenbasis(torch.tensor(x.T @ x), energy=energy)
    _, singular, rows = np.linalg.svd(x, full_matrices=False)
    shares = np.cumsum(singular**2) / np.sum(singular**2)
    rank = int(np.searchsorted(shares, energy * (1 - 1e-12))) + 1
    assert basis.shape == (12, min(rank, 12))
    np.testing.assert_allclose(np.cumsum(kept), shares[: basis.shape[1]])
    assert float(kept.sum()) >= energy * (1 - 1e-9)
    expected = rows[: basis.shape[1]].T @ rows[: basis.shape[1]]
    np.testing.assert_allclose((basis @ basis.T).numpy(), expected, atol=1e-7)


def test_energy_one_keeps_the_support_only():
    x = torch.randn(5, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    basis, kept = linalg.leading_eigenbasis(x.T @ x, energy=1.0)
    assert basis.shape == (20, 5)
    assert float(kept.sum()) == pytest.approx(1.0)
    torch.testing.assert_close(x @ basis @ basis.T, x)


@pytest.mark.parametrize("arguments", [{}, {"energy": 0.5, "rank": 1}, {"energy": 0.0}, {"energy": 1.1}, {"rank": 4}])
def test_arguments_out_of_range_are_errors(arguments):
    with pytest.raises(ValueError, match=r"energy|rank"):
        linalg.leading_eigenbasis(torch.eye(3), **arguments)


SOLVERS = {"covariance": Covariance, "gram": Gram, "randomized": Randomized}


def falling(n, d, seed=0):
    """Tokens whose singular values fall as those of a language model's activations do, about as a power."""
    source = torch.Generator().manual_seed(seed)
    normal = [torch.randn(side, min(n, d), generator=source, dtype=torch.float64) for side in (n, d)]
    left, right = (torch.linalg.qr(matrix).Q for matrix in normal)
    return left * torch.arange(1, min(n, d) + 1).double().pow(-1.5) @ right.T


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("shape", [(20, 60), (60, 20), (1, 8)])
def test_the_gram_matrix_gives_the_directions_of_the_covariance(shape, energy):
    x = falling(*shape)
    found, kept = linalg.leading_directions(x, energy=energy)
    expected, share = linalg.leading_eigenbasis(x.T @ x, energy=energy)
    assert found.shape == expected.shape
    torch.testing.assert_close(kept, share, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(found.T @ found, torch.eye(found.shape[1]).double())
    torch.testing.assert_close(found @ found.T, expected @ expected.T, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(300, 500), (500, 300), (30, 40)])
def test_the_range_finder_spans_nearly_the_leading_directions(shape):
    """Cosines of the principal angles to the exact span, and the share of energy that is held."""
    x = falling(*shape)
    found, kept = linalg.range_finder(x, 16)
    expected, share = linalg.leading_directions(x, rank=16)
    torch.testing.assert_close(found.T @ found, torch.eye(16).double())
    cosines = torch.linalg.svdvals(expected.T @ found)
    assert cosines.min() > 0.999
    assert kept.shape == (16,)
    assert share.sum() * (1 - 1e-4) < kept.sum() <= share.sum() * (1 + 1e-12)
    other, _ = linalg.range_finder(x.flip(0), 16)  # as several processes would gather them
    torch.testing.assert_close(other @ other.T, found @ found.T, atol=1e-9, rtol=0)


def test_a_rank_above_that_of_the_tokens_gives_what_there_is():
    x = falling(5, 40)
    assert linalg.leading_directions(x, rank=9)[0].shape == (40, 5)
    square = torch.cat([falling(5, 20), torch.zeros(15, 20).double()])
    assert linalg.leading_directions(square, rank=18)[0].shape == (20, 5)
    assert linalg.range_finder(x, 5)[0].shape == (40, 5)


def test_the_cheapest_way_is_chosen():
    assert cheapest(4000, 576, None) is Covariance
    assert cheapest(3000, 11008, None) is Gram
    assert cheapest(3000, 11008, 100) is Randomized
    assert cheapest(100_000, 4096, None) is Covariance
    assert cheapest(100_000, 4096, 64) is Randomized


@pytest.mark.parametrize("at_once", [1, 2**30])
@pytest.mark.parametrize("solver", SOLVERS)
def test_directions_of_collected_tokens(solver, at_once, monkeypatch):
    """The reference collects the tokens prompt by prompt and takes their singular vectors."""
    monkeypatch.setattr(basis, "cheapest", lambda n, width, rank: SOLVERS[solver])
    monkeypatch.setattr(reading, "MEMORY", at_once)
    model, chat = tiny.model(), tiny.chat()
    prompts = [chat.prompt_ids(prompt) for prompt in ("how do I", "tell me what", "one more of them, really")]
    for normalize, tokens in ((False, "all"), (True, "all"), (False, "no_sinks")):
        spec = SubspaceSpec("all_linear", None, 5, tokens, normalize)
        found = dict(basis.leading(model, prompts, spec, chat.pad_id, batch_size=2))
        assert list(found) == list(dict.fromkeys(matrix.site.name for matrix in linears(model, "all_linear")))
        rows = []
        for prompt in prompts:
            seen = []
            module = model.get_decoder().layers[1].mlp.down_proj
            handle = module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0][0]))
            with torch.no_grad():
                model(torch.tensor([prompt]))
            handle.remove()
            rows.append(seen[0][1:] if tokens == "no_sinks" else seen[0])
        x = torch.cat(rows).double()
        x = x / x.norm(dim=-1, keepdim=True) if normalize else x
        _, singular, right = torch.linalg.svd(x, full_matrices=False)
        each = found["layers.1.ffn_out"]
        assert each.solver == solver
        share = float(singular[:5].square().sum() / singular.square().sum())
        assert each.kept == pytest.approx(share, rel=1e-3)
        assert torch.linalg.svdvals(right[:5] @ each.basis.double()).min() > 0.99


@pytest.mark.parametrize("normalize", [True, False])
def test_what_lies_in_the_directions_is_their_energy_on_their_own_prompts_and_less_on_others(normalize):
    model, chat = tiny.model(), tiny.chat()
    prompts, others = ([chat.prompt_ids(text)] for text in ("how do I", "9 * 7 = ? (a sum)"))
    spec = SubspaceSpec("ffn_out", None, 4, "all", normalize)
    found = dict(basis.leading(model, prompts, spec, chat.pad_id))
    subspace = basis.subspace_of(found.items())
    mean = sum(subspace.energy.values()) / len(subspace.energy)
    assert coverage.covered(model, prompts, subspace, spec, chat.pad_id) == pytest.approx(mean, rel=1e-5)
    shares = []
    for layer, site in zip(model.get_decoder().layers, found, strict=True):
        seen = []
        handle = layer.mlp.down_proj.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0][0]))
        with torch.no_grad():
            model(torch.tensor(others))
        handle.remove()
        x = torch.nn.functional.normalize(seen[0]) if normalize else seen[0]
        shares.append(float((x @ found[site].basis).square().sum() / x.square().sum()))
    assert coverage.covered(model, others, subspace, spec, chat.pad_id) == pytest.approx(sum(shares) / 2, rel=1e-5)
    assert sum(shares) / 2 < mean


@pytest.mark.parametrize("way", ["covariance", "gram", "range finder"])
def test_directions_are_ordered_by_what_they_hold(way):
    """The first columns span what the leading singular vectors span, however many are taken."""
    source = torch.Generator().manual_seed(0)
    x = torch.randn(30, 20, generator=source, dtype=torch.float64) * 0.6 ** torch.arange(20)
    ways = {
        "covariance": lambda: linalg.leading_eigenbasis(x.T @ x, rank=8),
        "gram": lambda: linalg.leading_directions(x, rank=8),
        "range finder": lambda: linalg.range_finder(x, 8),
    }
    found, exact = ways[way]()[0], torch.linalg.svd(x).Vh.T
    for kept in (1, 3, 6):
        cosines = torch.linalg.svdvals(exact[:, :kept].T @ found[:, :kept])
        assert float(cosines.min()) > 0.999


class Tensor32(TorchDispatchMode):
    """Products as on a GPU that may use TF32: operands have 10 bits of mantissa where the flag lets them."""

    PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "mv")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.PRODUCTS and torch.backends.cuda.matmul.fp32_precision == "tf32":
            args = (*args[:-2], *map(self.rounded, args[-2:]))  # what is added is not rounded
        return func(*args, **(kwargs or {}))

    @staticmethod
    def rounded(x):
        if x.dtype != torch.float32:
            return x
        return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


# The names under which TF32 is allowed, and what a user may have set for all of torch.
ALLOWED = {
    "allow_tf32": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "fp32_precision": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "of all torch": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
}


def flags():
    """Return all that says how float32 products are made; what the older name cannot tell is None."""
    found = [torch.backends.fp32_precision, torch.backends.cuda.matmul.fp32_precision]
    found.append(torch.backends.mkldnn.matmul.fp32_precision)
    for read in (torch.get_float32_matmul_precision, lambda: torch.backends.cuda.matmul.allow_tf32):
        try:
            found.append(read())
        except RuntimeError:
            found.append(None)
    return found


@pytest.fixture(params=ALLOWED)
def tf32(request):
    """TF32 is allowed under one of its names, and emulated."""
    default = ["none", "none", "none", "highest", False]
    assert flags() == default
    ALLOWED[request.param]()
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    with Tensor32():
        yield
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"
    assert flags() == default


def leaked(moved, start, basis):
    """Return the leak in float64, which no flag concerns."""
    delta = moved.double() - start.double()
    return float((delta @ torch.linalg.qr(basis.double()).Q).norm() / delta.norm())


def restored(start, moved, basis):
    return linalg.restore_on_span_(moved, basis, linalg.product(start, basis)), moved


def projected(start, moved, basis):
    return None, start + linalg.remove_span(moved - start, basis)


def plain(start, moved, basis):
    return None, moved - (moved @ basis - start @ basis) @ basis.T


@pytest.mark.parametrize(("way", "most"), [(restored, 1e-6), (projected, 1e-6), (plain, None)])
def test_restoring_and_projecting_are_exact_whatever_the_flags(way, most, tf32):
    source, before = torch.Generator().manual_seed(0), flags()
    basis = torch.linalg.qr(torch.randn(96, 16, generator=source)).Q
    start = torch.randn(64, 96, generator=source)
    moved = start + 0.2 * torch.randn(64, 96, generator=source)
    leak = leaked(way(start, moved.clone(), basis)[1], start, basis)
    assert flags() == before
    assert leak > 5e-4 if most is None else leak <= most  # the emulation shows where it is not held off
    told = linalg.leak(way(start, moved.clone(), basis)[1] - start, basis)
    assert (told[0] / told[1]) ** 0.5 == pytest.approx(leak, rel=0.5)


def test_flags_are_restored_after_an_error_and_when_nested():
    torch.set_float32_matmul_precision("medium")
    before, cpu = flags(), torch.device("cpu")

    def broken():
        with linalg.full_float32(cpu):
            with linalg.full_float32(cpu):
                pass
            assert (flags()[1], torch.backends.cuda.matmul.allow_tf32) == ("ieee", False)
            raise KeyError

    with pytest.raises(KeyError):
        broken()
    assert flags() == before
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"


def test_projecting_is_exact_under_autocast():
    basis, matrix = torch.linalg.qr(torch.randn(24, 4)).Q, torch.randn(8, 24)
    with torch.autocast("cpu", torch.bfloat16):
        found = linalg.remove_span(matrix, basis)
    assert float((found @ basis).norm() / found.norm()) < 1e-6


@pytest.mark.parametrize("tf32", ["allow_tf32", "of all torch"], indirect=True)
@pytest.mark.parametrize(("tuning", "projection"), [(FULL, "update"), (FULL, "both"), (LORA, "both")])
def test_a_trained_model_leaks_nothing_under_tf32(tuning, projection, tf32):
    """With adapters too, whose product is merged into the weights."""
    defense = WeightConstraint(energy=0.9, projection=projection, restore_every_n_steps=3)
    model, prepared = train(defense, tuning=tuning, rows=ROWS, learning_rate=0.05)
    for matrix in linears(model, "all_linear"):
        basis, start = prepared.subspace.spans[matrix.site.name].basis, prepared.start_weight(matrix.name)
        assert leaked(matrix.module.weight.detach(), start, basis) < 3e-6
    assert defense.leak() < 3e-6
