"""Perplexity on plain text, against a loss that takes every document and token by itself."""

import math
import re

import pytest
import torch

from cwac_lab.config.run import check_machine, read
from cwac_lab.core.errors import LabError, MissingAsset
from cwac_lab.core.paths import PACKAGE
from cwac_lab.core.stats import mean_per
from cwac_lab.data import plain_text
from cwac_lab.evaluation import plain
from cwac_lab.models.chat import ChatFormat
from support import tiny


def by_hand(model, ids):
    with torch.no_grad():
        said = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return -sum(float(said[at, token]) for at, token in enumerate(ids[1:]))


def test_the_loss_of_each_document_without_the_chat_template():
    model, chat, texts = tiny.lively("llama"), tiny.chat(max_length=40), [*plain_text.documents(None)[:5], "two words"]
    found = plain.losses(model, chat, texts, batch_size=2)
    for text, (total, count) in zip(texts, found, strict=True):
        ids = tiny.tokenizer()(text)["input_ids"][:40]
        assert count == len(ids) - 1
        assert total == pytest.approx(by_hand(model, ids), rel=1e-5)
    assert {count for _, count in found} > {39}
    rate = plain.perplexity(found)
    assert rate.value == pytest.approx(math.exp(sum(t for t, _ in found) / sum(c for _, c in found)))
    assert (rate.low < rate.value < rate.high, rate.n) == (True, 6)


def test_a_text_begins_as_the_tokenizer_begins_one():
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    own = tiny.tokenizer()
    begun = PreTrainedTokenizerFast(tokenizer_object=own.backend_tokenizer.from_str(own.backend_tokenizer.to_str()))
    begun.backend_tokenizer.post_processor = TemplateProcessing("<|im_start|> $A", None, [("<|im_start|>", 1)])
    begun.add_special_tokens({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<pad>"})
    begun.chat_template = tiny.TEMPLATE
    plainly, with_begin = (plain.encoded(ChatFormat(each), "a fine film") for each in (own, begun))
    assert with_begin.input_ids == [1, *plainly.input_ids]
    assert [label for label in with_begin.labels if label >= 0] == plainly.input_ids


def test_forgetting_is_paired_by_document():
    start = [(10.0, 5), (40.0, 10), (6.0, 4)]
    now = [(11.0, 5), (42.0, 10), (6.8, 4)]  # 0.2 nats a token more everywhere
    rate = plain.forgetting(now, start)
    assert (rate.value, rate.high - rate.low) == (pytest.approx(0.2), pytest.approx(0, abs=1e-9))
    alone = mean_per([total for total, _ in now], [count for _, count in now])
    assert alone.high - alone.low > 1  # that of the documents themselves
    told = plain.told(now, start, ["a b", "c d", "e f"])
    assert told["perplexity"]["value"] == pytest.approx(told["perplexity_start"]["value"] * math.exp(0.2))
    assert set(plain.told(now, None, ["a b"])) == {"perplexity", "plain_text"}


@pytest.mark.parametrize("total", [math.nan, math.inf, 5000.0])
def test_a_model_without_numbers_has_no_perplexity(total):
    assert plain.perplexity([(total, 2), (3.0, 2)]).value is None


def runs_of_words(text, length=7):
    """All runs of consecutive words of a text."""
    words = re.findall(r"[a-z']+", text.lower())
    return {" ".join(words[at : at + length]) for at in range(len(words) - length + 1)}


def test_the_own_text_is_of_many_kinds_and_in_no_list_that_anything_is_trained_on():
    texts = plain_text.documents(None)
    assert len(texts) == len(set(texts)) == 60
    assert all(80 <= len(text.split()) <= 120 for text in texts)
    mine = set().union(*map(runs_of_words, texts))
    files = {file.name: file for file in (PACKAGE / "data" / "embedded").rglob("*.yaml")}
    shared = {name: mine & runs_of_words(file.read_text(encoding="utf-8")) for name, file in files.items()}
    assert {name for name, found in shared.items() if found} == {plain_text.OWN}
    assert len(shared[plain_text.OWN]) > 4000  # so it would be seen


ROWS = [
    ("a.txt", "\ufeffOne text\nof two lines.\n \n\nAnother one.\n", ["One text\nof two lines.", "Another one."]),
    ("a.jsonl", '{"text": "One text."}\n{"text": "Two texts.", "n": 1}\n', ["One text.", "Two texts."]),
    ("a.csv", "n,text\n1,One text.\n", ["One text."]),
]


@pytest.mark.parametrize(("name", "content", "texts"), ROWS, ids=[row[0] for row in ROWS])
def test_a_text_of_ones_own(name, content, texts, tmp_path):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert plain_text.documents(str(tmp_path / name)) == texts


BAD = [
    ("a.txt", b" \n\n", "a.txt: the file is empty"),
    ("a.txt", b"fine text\n\nalone\n", "a.txt, line 3: 'alone' is no document; accepted: a text of two words or more"),
    ("a.txt", b"\xff\xfe\x00", "a.txt: no text in UTF-8"),
    ("a.jsonl", b'{"text": "fine text"}\n{"body": "fine text"}\n', "a.jsonl, line 2: no column text; there are body"),
    ("a.jsonl", b'{"text": 3}\n', "a.jsonl, line 1: 3 is no document"),
    ("a.pdf", b"x", "accepted: a file of .txt, .jsonl, .json, .csv, .parquet"),
    ("a.txt", None, "accepted: a file of .txt"),
]


@pytest.mark.parametrize(("name", "content", "line"), BAD, ids=range(len(BAD)))
def test_a_text_that_cannot_be_read_is_one_line_before_weights_are_loaded(name, content, line, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    run = read(tiny.config("evaluation.perplexity=true", f"evaluation.plain_text={tmp_path / name}"))
    with pytest.raises(LabError) as raised:
        check_machine(run)
    assert line in str(raised.value)
    assert "\n" not in str(raised.value)
    assert isinstance(raised.value, MissingAsset) == ("accepted: a file" in line)
