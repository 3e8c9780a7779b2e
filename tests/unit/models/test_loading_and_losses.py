import copy

import pytest
import torch
from torch.nn.functional import cross_entropy

from cwac_lab.core.errors import ConfigError, LabError, MissingAsset
from cwac_lab.data.batches import collate, pad
from cwac_lab.evaluation.generate import answers, generate
from cwac_lab.models.answers import answer_logits, answer_loss
from cwac_lab.models.capture import layer_outputs, penalty_positions, site_inputs, without_sinks
from cwac_lab.models.chat import IGNORED, ChatFormat
from cwac_lab.models.loading import ModelConfig, content_digest, find, load_model
from cwac_lab.models.packaged import carry
from cwac_lab.models.prefix import opening_cache, shared_length
from cwac_lab.models.sites import SCOPES, depth_to_layer, linears
from support import tiny

IDS = torch.tensor([[3, 9, 27, 81, 243, 100], [7, 14, 28, 56, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mistral"])
def test_carried_weights_give_the_same_logits(architecture):
    source = tiny.model("llama", sliding_window=None)
    target = carry(source, architecture)
    assert target.config.model_type == architecture
    with torch.no_grad():
        expected, found = source(IDS, attention_mask=MASK).logits, target(IDS, attention_mask=MASK).logits
    torch.testing.assert_close(found[MASK.bool()], expected[MASK.bool()], atol=1e-5, rtol=1e-5)


def test_carry_refuses_what_does_not_fit():
    with pytest.raises(ConfigError, match="architecture"):
        carry(tiny.model(), "gemma3_text")


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_head_at_labelled_positions_equals_the_full_head(architecture):
    model, chat = tiny.model(architecture), tiny.chat()
    batch = collate([chat.encode("is it good", "positive"), chat.encode("a longer question, is it", "no")], chat.pad_id)
    with torch.no_grad():
        full = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        logits, targets = answer_logits(model, batch)
    wanted = batch["labels"][:, 1:]
    torch.testing.assert_close(logits, full[:, :-1][wanted != IGNORED])
    expected = cross_entropy(full[:, :-1].reshape(-1, full.shape[-1]), wanted.reshape(-1), ignore_index=IGNORED)
    torch.testing.assert_close(answer_loss(model, batch), expected, check_dtype=False)
    assert targets.tolist() == wanted[wanted != IGNORED].tolist()


def test_a_turn_ends_with_the_templates_own_token():
    wrapped = copy.deepcopy(tiny.tokenizer())
    wrapped.eos_token = "<pad>"  # as in Gemma's base models: the template ends a turn with a token without a role
    end = wrapped.convert_tokens_to_ids("<|im_end|>")
    assert end not in wrapped.all_special_ids
    chat = ChatFormat(wrapped)
    assert chat.end_id == end
    assert chat.encode("question", "answer").labels[-1] == end
    assert chat.decode(wrapped("fine<|im_end|>")["input_ids"]) == "fine"


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_a_shared_opening_gives_the_same_loss_and_gradients(architecture):
    """The reference is the model's own loss over rows in full, each with the whole conversation."""
    chat, instruction = tiny.chat(), "Analyze the sentiment of the input: "
    rows = [("a fine film", "positive"), ("no", "negative"), ("what a long and tiring story it is", "negative")]
    batch = collate([chat.encode(instruction + text, label) for text, label in rows], chat.pad_id)
    first = int((batch["labels"] != IGNORED).int().argmax(1).min())
    assert shared_length(batch["input_ids"].tolist(), first - 1) > 10
    plain, shared = tiny.model(architecture), tiny.model(architecture)
    expected, found = plain(**batch).loss, answer_loss(shared, batch)
    torch.testing.assert_close(found, expected)
    expected.backward()
    found.backward()
    for one, other in zip(shared.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("rows", "most", "expected"),
    [
        ([[1] * 20, [1] * 12 + [2] * 3], 99, 12),
        ([[1] * 20, [1] * 12 + [2] * 3], 10, 10),
        ([[1] * 20, [1] * 9], 99, 9),
        ([[1] * 20, [1] * 4 + [2]], 99, 0),  # not worth it
        ([[1] * 20], 99, 0),
    ],
)
def test_length_of_a_shared_opening(rows, most, expected):
    assert shared_length(rows, most) == expected


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2", "gemma3_text"])
def test_an_opening_longer_than_the_window(architecture):
    """Layers with a sliding window see across the opening's end; a window that a model ignores changes nothing."""
    chat, opening = tiny.chat(), "the same words again " * 6
    batch = collate([chat.encode(opening + text, "positive") for text in ("one", "two of them", "3")], chat.pad_id)
    plain, shared = (tiny.lively(architecture, sliding_window=16) for _ in range(2))
    assert shared_length(batch["input_ids"].tolist(), 400) > 3 * 16
    expected, found = plain(**batch).loss, answer_loss(shared, batch)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    expected.backward()
    found.backward()
    for one, other in zip(shared.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-3 * float(other.grad.abs().max()), rtol=1e-2)


def test_a_decoder_without_a_cache_is_an_error():
    model, chat = tiny.model().train(), tiny.chat()
    model.gradient_checkpointing_enable()
    opening = model.get_input_embeddings()(torch.tensor(chat.encode("the very same opening", "yes").input_ids))
    with pytest.raises(LabError, match="gradient checkpointing"):
        opening_cache(model, opening, 2)


def test_under_gradient_checkpointing_no_opening_is_shared():
    model, chat = tiny.model(), tiny.chat()
    batch = collate([chat.encode(f"the very same opening {text}", "yes") for text in "ab"], chat.pad_id)
    expected = answer_loss(model, batch)
    model.train().gradient_checkpointing_enable()
    torch.testing.assert_close(answer_loss(model, batch), expected)


PROMPTS = [
    "is it so",
    "is it a fine film",
    "is it one of the best of the year, and why",
    "is it no",
    "is it 7",
    "is it ???",
]


@pytest.mark.parametrize("window", [16, 64, 512])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_batched_generation_equals_batch_size_one(architecture, window):
    model, chat = tiny.lively(architecture, sliding_window=window), tiny.chat()
    encoded = [chat.prompt_ids(prompt) for prompt in PROMPTS]
    assert shared_length(encoded, min(map(len, encoded)) - 1) >= 8
    answers = generate(model, chat, PROMPTS, 8, batch_size=len(PROMPTS))
    assert len(set(answers)) >= 4
    assert answers == generate(model, chat, PROMPTS, 8, batch_size=1)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_answers_can_be_kept_from_an_opening(architecture):
    """Also where the opening of the prompts is in the cache already; later tokens are free."""
    model, chat = tiny.lively(architecture), tiny.chat()
    free = answers(model, chat, PROMPTS, 8)
    held = answers(model, chat, PROMPTS, 8, not_first={answer.first for answer in free})
    assert not {answer.first for answer in held} & {answer.first for answer in free}
    assert held == answers(model, chat, PROMPTS, 8, batch_size=1, not_first={answer.first for answer in free})


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_truncated_forward_gives_the_layers_output(architecture):
    model = tiny.model(architecture)
    with torch.no_grad():
        states = model.get_decoder()(IDS, attention_mask=MASK, output_hidden_states=True).hidden_states
        found = layer_outputs(model, [0], IDS, MASK)
    torch.testing.assert_close(found[0], states[1])
    assert model.config.num_hidden_layers == 2


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_layers_outputs_and_gradients_are_alike_with_a_shared_opening(architecture):
    """The reference is each row alone, in full."""
    chat = tiny.chat()
    rows = [chat.prompt_ids("Analyze the sentiment of the input: " + text) for text in ("a fine film", "no", "bread")]
    ids, mask = pad(rows, chat.pad_id)
    assert shared_length(ids.tolist(), int(mask.sum(1).min()) - 1) > 10
    grads = []
    for alone in (True, False):
        model = tiny.model(architecture)
        if alone:
            parts = [layer_outputs(model, [0, 1], torch.tensor([row]), torch.ones(1, len(row)).long()) for row in rows]
            states = {layer: [part[layer][0] for part in parts] for layer in (0, 1)}
        else:
            found = layer_outputs(model, [0, 1], ids, mask)
            assert found[1].shape[:2] == ids.shape
            states = {layer: [found[layer][i, : len(row)] for i, row in enumerate(rows)] for layer in (0, 1)}
        sum(part.square().sum() for parts in states.values() for part in parts).backward()
        grads.append((states, [p.grad for p in model.parameters()]))
    (expected, plain), (got, shared) = grads
    for layer in (0, 1):
        for one, other in zip(got[layer], expected[layer], strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    for one, other in zip(shared, plain, strict=True):
        assert (one is None) is (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("scope", SCOPES)
def test_scopes_name_the_weights_they_yield(scope):
    model = tiny.model()
    found = list(linears(model, scope))
    assert all(model.get_parameter(linear.name) is linear.module.weight for linear in found)
    seen = {}
    with site_inputs(model, scope, lambda site, x: seen.setdefault(site.name, x)):
        model(IDS, attention_mask=MASK)
    assert set(seen) == {linear.site.name for linear in found}
    assert all(seen[linear.site.name].shape[-1] == linear.module.in_features for linear in found)
    counts = {"ffn_out": 1, "ffn": 3, "attention": 4, "all_linear": 7}
    assert len(found) == 2 * counts[scope]


def test_sinks_and_padding_are_no_penalty_positions():
    x = torch.ones(2, 6, 4)
    x[0, 3] *= 100
    keep = without_sinks(x, MASK)
    assert keep.tolist() == [[False, True, True, False, True, True], [False, True, True, True, False, False]]
    last = penalty_positions(x, MASK, "last", 2)
    assert last.tolist() == [[False, False, False, False, True, True], [False, False, True, True, False, False]]


@pytest.mark.parametrize(("depth", "n", "layer"), [(0, 30, 0), (0.6, 30, 18), (0.94, 30, 28), (0.999, 2, 1)])
def test_depth_to_layer(depth, n, layer):
    assert depth_to_layer(depth, n) == layer


def test_chat_boundaries_and_labels():
    chat = tiny.chat()
    row = chat.encode("question one", "an answer")
    prompt = chat.prompt_ids("question one")
    assert row.input_ids[: len(prompt)] == prompt
    assert row.labels[: len(prompt)] == [IGNORED] * len(prompt)
    assert row.labels[len(prompt) :] == row.input_ids[len(prompt) :]
    assert row.labels[-1] == chat.end_id == tiny.tokenizer().convert_tokens_to_ids("<|im_end|>")
    assert chat.decode(row.input_ids[len(prompt) :]) == "an answer"


def test_long_prompts_are_cut_from_the_left_behind_the_templates_opening():
    chat, long = tiny.chat(max_length=40), "word " * 60 + "last"
    opening = chat.tokens("<|im_start|>user\n")
    row, whole = chat.encode(long, "yes"), tiny.chat().encode(long, "yes")
    assert row.input_ids == opening + whole.input_ids[len(opening) - 40 :]
    assert row.labels[-3:] == whole.labels[-3:]
    asked = chat.prompt_ids(long)
    assert asked == opening + tiny.chat().prompt_ids(long)[len(opening) - 40 :]
    assert [row.cut, whole.cut, chat.encode("short", "yes").cut] == [True, False, False]
    assert chat.n_cut([long, "short", long]) == 2
    assert list(chat.told_cut(2, 3, "prompts")) == [
        "2 of 3 prompts are longer than trainer.max_length=40 tokens: their prompts are cut from the left"
    ]
    assert not list(chat.told_cut(0, 3, "prompts"))


def test_an_answer_that_leaves_no_room_is_cut_from_the_right():
    row = tiny.chat(max_length=40).encode("how", "word " * 60)
    assert len(row.input_ids) == 40
    assert row.cut
    assert row.labels[-1] != tiny.chat().end_id


def test_pad_id_does_not_change_the_hidden_states():
    model = tiny.model()
    left, mask = pad([[5, 6, 7, 8], [9, 10]], 0, left=True)
    with torch.no_grad():
        alone = model(torch.tensor([[9, 10]])).logits[0, -1]
        other = left.clone()
        other[mask == 0] = 77
        position = (mask.cumsum(1) - 1).clamp_min(0)
        found = [model(ids, attention_mask=mask, position_ids=position).logits[1, -1] for ids in (left, other)]
    for logits in found:
        torch.testing.assert_close(logits, alone, atol=1e-5, rtol=1e-5)


def test_local_folder_round_trip(tiny_folder, tmp_path):
    found = find(ModelConfig("mine", str(tiny_folder), align="none"), "embedded", tmp_path)
    assert found.content == content_digest(tiny_folder)
    assert "mine: local folder" in found.description
    assert load_model(found.path).config.num_hidden_layers == 2


def test_pickled_weights_are_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(MissingAsset, match="pickled"):
        content_digest(tmp_path)


def test_an_answer_tells_whether_the_model_ended_it():
    """One that ended is the same at a higher limit, one that was cut off goes on."""
    model, chat = tiny.lively("llama", seed=3), tiny.chat()
    prompts = [f"question {i}" for i in range(24)]
    short, long = (answers(model, chat, prompts, limit, batch_size=8) for limit in (24, 48))
    assert {answer.ended for answer in short} == {True, False}
    for one, other in zip(short, long, strict=True):
        assert other.text.startswith(one.text.rstrip("\ufffd"))  # a cut may fall within a character
        if one.ended:
            assert one == other
