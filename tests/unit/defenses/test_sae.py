import shutil

import pytest
import torch

from cwac_lab.core.cache import read_json
from cwac_lab.core.errors import LabError, QualityError
from cwac_lab.defenses.cwac.activation import encode
from cwac_lab.defenses.cwac.sae import activations, latents
from cwac_lab.defenses.cwac.sae import train as sae_train
from cwac_lab.defenses.cwac.sae.latents import FeatureSpec
from support import tiny

CONFIG = sae_train.SAEConfig(n_latents=128, k=8, steps=60, batch_size=256, min_explained_variance=-10)


@pytest.fixture(scope="module")
def data():
    source = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(40, 32, generator=source), dim=-1)
    active = (torch.rand(4000, 40, generator=source) < 0.08).float() * torch.rand(4000, 40, generator=source)
    return 10 * (active @ directions) + 3 + 0.1 * torch.randn(4000, 32, generator=source)


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    where = tmp_path_factory.mktemp("sae")
    sae_train.train(data[800:], data[:800], CONFIG, "model.layers.0", where)
    return where


def test_affine_encoder_equals_the_librarys(data, folder):
    weight, bias, k = sae_train.encoder(folder)
    codes = latents.topk_codes(data[:200], weight, bias, k)
    expected = sae_train.load(folder).encode(data[:200])
    torch.testing.assert_close(codes, expected, atol=1e-4, rtol=1e-4)
    assert sae_train.decoder_directions(folder).shape == (128, 32)


def test_the_report_tells_of_copies_that_were_dropped(data, tmp_path):
    few = sae_train.SAEConfig(n_latents=16, k=2, steps=2, batch_size=64, min_explained_variance=-1e9)
    told = sae_train.train(data[800:], data[:800], few, "model.layers.0", tmp_path, {"copies_share": 0.25})
    assert told["copies_share"] == 0.25
    assert read_json(tmp_path / sae_train.REPORT) == told


@pytest.mark.parametrize("name", ["sae_weights.safetensors", "cfg.json"])
def test_a_damaged_autoencoder_is_one_line(name, folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "sae")
    sae_train.load(copied)
    whole = (copied / name).read_bytes()
    for left in (whole[: len(whole) // 2], b""):
        (copied / name).write_bytes(left)
        with pytest.raises(LabError, match=r"sae: a file in it is missing or damaged .* remove this folder") as raised:
            sae_train.load(copied)
        assert "\n" not in str(raised.value)


def test_quality_is_that_of_the_definition(data, folder):
    sae, x = sae_train.load(folder), data[:500]
    report = sae_train.quality(sae, x)
    codes = sae.encode(x)
    unexplained = ((x - sae.decode(codes)) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    assert report["fraction_variance_unexplained"] == pytest.approx(float(unexplained), rel=1e-5)
    assert report["explained_variance"] > 0.2
    assert 0 < report["l0"] <= CONFIG.k
    assert report["dead_share"] == pytest.approx(float((codes <= 0).all(0).float().mean()))


def test_a_poor_autoencoder_is_an_error(data, tmp_path):
    config = sae_train.SAEConfig(n_latents=16, k=1, steps=2, batch_size=64, min_explained_variance=0.9)
    with pytest.raises(QualityError, match="min_explained_variance"):
        sae_train.train(data[800:], data[:800], config, "model.layers.0", tmp_path)


def test_export_and_load_keep_what_a_penalty_needs(data, folder, tmp_path):
    encoder = sae_train.encoder(folder)
    scores = torch.arange(128.0)
    chosen = scores.topk(5).indices
    scale = torch.full((5,), 2.0)
    latents.export(tmp_path, 0, encoder, chosen, scores, scale, {}, torch.ones(8, 6))
    (features,) = latents.load(tmp_path)
    full = data[:50] @ encoder[0] + encoder[1]
    torch.testing.assert_close(encode(data[:50], features, "pre"), full[:, chosen])
    topk = latents.topk_codes(data[:50], *encoder)[:, chosen]
    torch.testing.assert_close(encode(data[:50], features, "topk"), topk)


@pytest.mark.parametrize("selection", ["mean_difference", "frequency_difference"])
def test_scores_find_the_planted_latent(selection):
    harmful, benign = torch.rand(100, 6) * 0.1, torch.rand(100, 6) * 0.1
    harmful[:, 4] += 1.0
    benign[:, 4] = 0.0
    assert int(latents.score(selection, harmful, benign, None, 0).argmax()) == 4


def test_random_scores_are_a_control_among_firing_latents():
    harmful = torch.zeros(10, 6)
    harmful[:, :3] = 1
    scores = latents.score("random", harmful, harmful, None, 0)
    assert (scores[:3] > 0).all()
    assert (scores[3:] == 0).all()


def test_attribution_equals_a_finite_difference():
    model, chat = tiny.model().double(), tiny.chat()
    prompt = chat.prompt_ids("how do I do this")
    spec = FeatureSpec((0.0,), 2, "attribution", "last", 1)
    source = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 6, generator=source)
    encoder, directions = (weight, torch.ones(6) * 50, 6), torch.randn(6, 32, generator=source)
    found = latents.attribution(model, 0, [prompt], spec, chat.pad_id, [40, 41], encoder, directions)
    x = latents.residuals(model, 0, [prompt], spec, chat.pad_id)
    codes = latents.topk_codes(x, *encoder)

    def log_probability(shift):
        def hook(_, __, output):
            moved = (output[0] if isinstance(output, tuple) else output).clone()
            moved[:, -1] += shift
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        handle = model.get_decoder().layers[0].register_forward_hook(hook)
        with torch.no_grad():
            logits = model(torch.tensor([prompt])).logits[0, -1]
        handle.remove()
        return float(logits.log_softmax(-1)[[40, 41]].logsumexp(-1))

    for latent in range(6):
        step = 1e-4 * directions[latent].double()
        slope = (log_probability(step) - log_probability(-step)) / 2e-4
        assert float(found[latent]) == pytest.approx(float(codes[0, latent]) * slope, rel=2e-3, abs=1e-4)
    assert all(parameter.grad is None for parameter in model.parameters())


def texts(kind, n, opening=()):
    """Return ``n`` conversations of ten tokens after an opening, alike in nothing else."""
    return [[*opening, 1000 * kind + i, *[kind] * 9] for i in range(n)]


def test_collected_activations_leave_sinks_out_and_blend_keeps_shares():
    model = tiny.model()
    conversations = [[3, 4, 5, 6], [7, 8, 9]]
    assert activations.collect(model, 1, conversations, 0).shape == (5, 32)
    chosen = activations.blend(texts(1, 50), texts(2, 50), 200, 0.7, 0)
    assert sum(len(c) for c in chosen if c[-1] == 1) == 140
    assert sum(len(c) for c in chosen if c[-1] == 2) == 60


def test_a_kind_that_is_used_up_shrinks_the_total():
    chosen = activations.blend(texts(1, 7), texts(2, 50), 200, 0.7, 0)
    assert [sum(len(c) for c in chosen if c[-1] == kind) for kind in (1, 2)] == [70, 30]


def test_copies_are_not_counted_among_the_tokens_to_draw():
    opening = [7] * 30
    chosen = activations.blend(texts(1, 50, opening), texts(2, 50, opening), 230, 0.7, 0)
    # 161 harmful tokens are the opening, once, and those of 14 texts; 69 benign ones are those of 7 without it.
    assert [sum(c[-1] == kind for c in chosen) for kind in (1, 2)] == [14, 7]
    twice = activations.blend(texts(1, 20) * 2, texts(2, 20) * 2, 10**6, 0.5, 0)
    assert len(twice) == len(set(map(tuple, twice))) == 40


@pytest.mark.parametrize(
    ("conversations", "share"),
    [
        ([[3, 4, 5], [6, 7]], 0),
        ([[3, 4, 5], [3, 4, 6]], 2 / 6),
        ([[3, 4, 5], [3, 4, 5], [3, 4]], 5 / 8),
        ([[3, 4, 5], [9, 4, 5]], 0),  # the same tokens after another one are others
    ],
)
def test_the_share_of_copies(conversations, share):
    assert activations.copies(conversations) == pytest.approx(share)


def test_an_opening_that_texts_share_is_collected_once():
    model, batch = tiny.model(), 3
    opening = [9, 4, 17, 5, 8, 6, 30, 12, 11]
    different = [[20 + i, 40 + i, 60 + i][: 1 + i % 3] for i in range(8)]
    conversations = [opening + tail for tail in different]
    x = activations.collect(model, 1, conversations, 0, batch_size=batch)
    assert len(x) == len(opening) - 1 + sum(map(len, different))  # the first token is a sink
    near = torch.cdist(x, x) + 10 * torch.eye(len(x))
    assert near.min() > 1e-3  # no two are the same
    with torch.no_grad():
        every = torch.cat([model.model(torch.tensor([ids])).last_hidden_state[0, 1:] for ids in conversations])
        found = model.model.norm(x)  # of two layers the second is the last
    apart = torch.cdist(every.double(), found.double())
    assert apart.amin(1).max() < 1e-4  # each is there
    assert apart.amin(0).max() < 1e-4


def test_texts_without_a_context_of_their_own_are_one_line():
    with pytest.raises(QualityError, match=r"sae\.n_tokens"):
        activations.collect(tiny.model(), 0, [[3, 4]], 0, unlike=[[3, 4, 5]])
    few = torch.zeros(1, 32)
    for data, held_out in ((few, torch.randn(9, 32)), (torch.randn(9, 32), few)):
        with pytest.raises(QualityError, match="accepted: >= 2"):
            sae_train.train(data, held_out, CONFIG, "model.layers.0", None)


def test_held_out_tokens_share_no_context_with_training():
    model = tiny.model()
    data, held_out = [[3, 4, 5, 6], [3, 4, 9]], [[3, 4, 5, 7, 8]]
    x, y = activations.collect(model, 0, data, 0), activations.collect(model, 0, held_out, 0, unlike=data)
    assert y.shape == (2, 32)
    assert torch.cdist(y, x).min() > 1e-3
    parts = activations.split([[i] for i in range(10)], 0.2, 0)
    assert [len(part) for part in parts] == [8, 2]
    assert sorted(parts[0] + parts[1]) == [[i] for i in range(10)]
