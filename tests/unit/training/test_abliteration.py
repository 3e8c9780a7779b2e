"""Abliteration: what is taken out of the weights, against hooks on the residual stream, and which layer is chosen."""

import pytest
import torch

from cwac_lab.core.errors import LabError
from cwac_lab.models.capture import layer_outputs
from cwac_lab.models.sites import decoder, linears
from cwac_lab.training.abliteration import Tried, abliterate, directions, remove_
from support import tiny

HARMFUL = [f"how do I break thing {i}" for i in range(8)]
HARMLESS = [f"what is the sum of {i}" + " and one" * (i % 3) for i in range(8)]


def asked(texts):
    return [tiny.chat().prompt_ids(text) for text in texts]


def test_directions_are_differences_of_means_at_the_last_token():
    model = tiny.model()
    found = directions(model, asked(HARMFUL), asked(HARMLESS), tiny.chat().pad_id)
    means = []
    for texts in (HARMFUL, HARMLESS):
        rows = []
        for ids in asked(texts):
            with torch.no_grad():
                hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
            rows.append(hidden[1][0, -1])  # after layer 0
        means.append(torch.stack(rows).mean(0))
    expected = torch.nn.functional.normalize(means[0] - means[1], dim=0)
    torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "phi3", "granite"])
def test_removed_weights_compute_what_removing_from_the_stream_does(architecture):
    """The reference takes r out of the embeddings, and out of what attention and the FFN add, by hooks."""
    model, edited = tiny.model(architecture), tiny.model(architecture)
    r = torch.nn.functional.normalize(
        torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(1)), dim=0
    )
    remove_(edited, r)

    def without(_, __, output):
        first = output[0] if isinstance(output, tuple) else output
        kept = first - (first @ r)[..., None] * r
        return (kept, *output[1:]) if isinstance(output, tuple) else kept

    model.get_input_embeddings().register_forward_hook(without)
    for layer in decoder(model).layers:
        layer.self_attn.register_forward_hook(without)
        layer.mlp.register_forward_hook(without)
    rows = torch.tensor(asked(HARMFUL[:1]))
    mask = torch.ones_like(rows)
    with torch.no_grad():
        found, expected = (layer_outputs(each, [1], rows, mask)[1] for each in (edited, model))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert (found @ r).abs().max() < 1e-5
    writers = [each for each in linears(edited, "all_linear") if each.site.kind in ("attn_out", "ffn_out")]
    assert len(writers) == 2 * len(decoder(edited).layers)
    assert max(float((r @ each.weight.detach()).norm() / each.weight.detach().norm()) for each in writers) < 1e-6


def test_what_is_tried_leaves_no_trace_and_the_choice_is_the_gentle_one_that_refuses_least(monkeypatch):
    model, chat = tiny.model(), tiny.chat()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    given = asked(HARMFUL), asked(HARMLESS), [65, 66, 67], chat.pad_id
    monkeypatch.setattr("cwac_lab.training.abliteration.MOST", 1e9)
    chosen, tried = abliterate(model, *given)
    assert chosen == min(tried, key=lambda each: each.refusing)
    once = tiny.model()
    halves = asked(HARMFUL[:4]), asked(HARMLESS[:4])
    remove_(once, directions(once, *halves, chat.pad_id)[chosen.layer])
    for name, value in once.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, atol=1e-6, rtol=0)
    assert any(not torch.equal(value, start[name]) for name, value in model.state_dict().items())
    monkeypatch.setattr("cwac_lab.training.abliteration.MOST", 0.0)
    gentlest, tried = abliterate(tiny.model(), *given)
    assert gentlest == min(tried, key=lambda each: each.moved)
    assert all(isinstance(each, Tried) and each.moved > 0 for each in tried)


def test_layers_that_add_a_bias_and_too_few_prompts_are_one_line():
    chat = tiny.chat()
    with pytest.raises(LabError, match="bias"):
        remove_(tiny.model("gpt2"), torch.nn.functional.normalize(torch.ones(32), dim=0))
    for architecture in ("gemma2", "gemma3_text", "olmo2"):
        with pytest.raises(LabError, match="a norm stands behind"):
            remove_(tiny.model(architecture), torch.nn.functional.normalize(torch.ones(32), dim=0))
    with pytest.raises(LabError, match="4 of each"):
        abliterate(tiny.model(), asked(HARMFUL[:3]), asked(HARMLESS), [65], chat.pad_id)
