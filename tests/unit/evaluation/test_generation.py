"""Answers are greedy and end where they should, whatever a model's folder says; what a run saves ends there as well."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from cwac_lab import train
from cwac_lab.config.run import read
from cwac_lab.core.cache import read_json, read_jsonl, write_json
from cwac_lab.core.errors import ConfigError
from cwac_lab.data.batches import collate
from cwac_lab.evaluation import engines
from cwac_lab.evaluation.generate import Answer, answers, end_ids, read_answer
from cwac_lab.evaluation.protocol import answered, remarks
from cwac_lab.models.answers import answer_loss
from cwac_lab.models.chat import ChatFormat
from cwac_lab.models.context import check_context
from cwac_lab.models.exporting import export
from support import families, tiny
from support.families import FAMILIES, Family

PROMPTS = ["a fine film", "how to bake bread and plan a trip", "poem", "what is the answer to the question?"]
SETTINGS = [
    {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 5},
    {"repetition_penalty": 1.8},
    {"no_repeat_ngram_size": 1},
    {"suppress_tokens": list(range(40, 300))},
    {"begin_suppress_tokens": list(range(40, 300))},
    {"bad_words_ids": [[token] for token in range(40, 300)]},
    {"forced_bos_token_id": 7, "forced_eos_token_id": 9},
    {"min_new_tokens": 12},
    {"min_length": 200},
    {"eos_token_id": list(range(40, 300))},
    {"num_beams": 3, "length_penalty": 0.2},
    {"sequence_bias": [[[50], 40.0]]},
    {"max_new_tokens": 1},
    {"max_time": 1e-9},
    {"use_cache": False},
    {"cache_implementation": "static"},
    {"guidance_scale": 3.0},
]


@pytest.fixture(scope="module")
def plain():
    return answers(tiny.lively("llama"), tiny.chat(), PROMPTS, 12, batch_size=3)


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: next(iter(setting)))
def test_answers_do_not_follow_a_models_own_settings_of_generation(setting, plain):
    model = tiny.lively("llama")
    model.generation_config = own = GenerationConfig(**setting)
    assert answers(model, tiny.chat(), PROMPTS, 12, batch_size=3) == plain
    assert model.generation_config is own


def test_an_answer_ends_at_any_end_that_config_and_tokenizer_name(plain):
    """A number that is a word to the tokenizer is none of them: configurations name ends of other tokenizers."""
    chat = ChatFormat(families.tokenizer(FAMILIES["gemma2"]))  # the template ends turns otherwise than the tokenizer
    turn, eos, other = chat.tokenizer.convert_tokens_to_ids(["<end_of_turn>", "<eos>", "<|endoftext|>"])
    word = chat.tokens("film")[0]
    for named, ends in ((None, [turn, eos]), (other, [turn, eos, other]), ([word, turn], [turn, eos]), (word, None)):
        model = tiny.model(eos_token_id=named)
        assert end_ids(model, chat) == sorted(ends or [turn, eos], key=lambda end: (end != turn, end))
    model, said = tiny.model(eos_token_id=other), chat.tokens("a fine film")
    for end in (turn, eos, other):
        assert read_answer(model, chat, [], [*said, end, *said]) == Answer("a fine film", True, said[0])
    assert read_answer(model, chat, said, said) == Answer("a fine filma fine film", False, said[0])


def test_thoughts_are_marked_and_unfinished_ones_are_an_empty_answer():
    chat, model = ChatFormat(families.tokenizer(FAMILIES["qwen3"])), tiny.model()
    thought = chat.tokens("<think>\nwell\n</think>\n\nno")
    assert read_answer(model, chat, [], [*thought, chat.end_id]) == Answer("no", True, thought[0], thoughts=True)
    assert read_answer(model, chat, [], thought[:3]) == Answer("", False, thought[0], thoughts=True)


def test_cut_prompts_and_thoughts_are_marked_in_the_record_and_told(monkeypatch):
    given = iter([Answer("fine", True, 1), Answer("no", True, 1, thoughts=True), Answer("", False, 1, thoughts=True)])
    monkeypatch.setitem(engines.ENGINES, "hf", lambda *_: lambda prompts, **_: [next(given) for _ in prompts])
    run, chat = read(tiny.config()), tiny.chat(max_length=40)
    asked = {"harmful": [{"prompt": "how"}, {"prompt": "why " * 40}], "task": [{"prompt": "what"}]}
    rows = answered(run, asked, tiny.model(), chat)
    assert rows == [
        {"prompt": "how", "output": "fine"},
        {"prompt": "why " * 40, "output": "no", "cut": True, "thoughts": True},
        {"prompt": "what", "output": "", "thoughts": True},
    ]
    cut, thoughts = remarks(rows, chat)
    assert cut == "1 of 3 prompts are longer than trainer.max_length=40 tokens: their prompts are cut from the left"
    assert thoughts.startswith("2 of 3 answers begin with thoughts, which are left out; 1 of them go no further")
    assert not list(remarks(rows[:1], chat))


def taught(family):
    """Teach a tiny model two answers until it knows them; returns it with its chat format."""
    chat = ChatFormat(families.tokenizer(family))
    model = tiny.model(vocab_size=512, eos_token_id=chat.tokenizer.eos_token_id, initializer_range=0.2)
    batch = collate([chat.encode("is it bread", "positive"), chat.encode("is it a trip", "negative yes")], chat.pad_id)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        loss = answer_loss(model, batch)
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    return model, chat


@pytest.mark.parametrize(
    "name",
    ["alpaca", "qwen3", "qwen3_without_a_switch", "thoughts_only", "channels", "parts", "asks_nothing", "gemma2"],
)
def test_what_was_taught_is_answered_and_ended(name, tmp_path):
    """In the run, and by plain transformers in the folder that it leaves."""
    model, chat = taught(FAMILIES[name])
    given = answers(model, chat, ["is it bread", "is it a trip"], 24)
    assert [(answer.text, answer.ended, answer.thoughts) for answer in given] == [
        ("positive", True, False),
        ("negative yes", True, False),
    ]
    export(model, chat, tmp_path / "saved", tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    ids = torch.tensor([chat.prompt_ids("is it bread")])
    new = saved.generate(ids, max_new_tokens=24)[0, ids.shape[1] :].tolist()
    assert new == [*chat.encode("is it bread", "positive").input_ids[ids.shape[1] :]]
    assert new[-1] == chat.end_id == tokenizer.eos_token_id
    assert ChatFormat(tokenizer).encode("is it", "yes") == chat.encode("is it", "yes")


EXPORTS = {
    "one end": ({"eos_token_id": 13}, {"eos_token_id": [12, 13]}),
    "several ends": ({"eos_token_id": [13, 12, 8]}, {"eos_token_id": [12, 13, 8]}),
    "its own end": ({"eos_token_id": 12, "_from_model_config": True}, {"eos_token_id": 12}),
    "no end": ({}, {"eos_token_id": 12}),
    "how the owner samples": (
        {"eos_token_id": 13, "do_sample": False, "temperature": 0.6, "repetition_penalty": 1.1},
        {"eos_token_id": [12, 13], "do_sample": False, "temperature": 0.6, "repetition_penalty": 1.1},
    ),
}


@pytest.mark.parametrize("case", EXPORTS)
def test_an_export_puts_end_and_padding_right_and_nothing_else(case, tmp_path):
    start, expected = EXPORTS[case]
    chat = ChatFormat(families.tokenizer(FAMILIES["chatml_on_a_base_model"], pad_token=None))
    assert chat.end_id == chat.pad_id == 11 + families.CONTROL[11:].index("<|im_end|>")
    write_json(tmp_path / "generation_config.json", start)
    export(tiny.model(vocab_size=512), chat, tmp_path / "saved", tmp_path)
    assert read_json(tmp_path / "saved" / "generation_config.json") == expected | {"pad_token_id": 12}
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert saved.eos_token == saved.pad_token == "<|im_end|>"
    assert chat.tokenizer.eos_token == "<|endoftext|>"


def test_a_tokenizer_keeps_its_end_where_the_template_writes_it(tmp_path):
    template = FAMILIES["chatml_on_a_base_model"].template.replace("'<|im_start|>'", "eos_token + '<|im_start|>'")
    chat = ChatFormat(families.tokenizer(Family(template, "<|im_end|>", "")))
    export(tiny.model(vocab_size=512, eos_token_id=2), chat, tmp_path / "saved", tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert saved.eos_token == "</s>"
    assert read_json(tmp_path / "saved" / "generation_config.json")["eos_token_id"] == [chat.end_id, 2]


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"max_position_embeddings": 64}, "max_position_embeddings"),
        ({"n_positions": 64}, "n_positions"),
        ({"text_config": {"max_position_embeddings": 64}}, "max_position_embeddings"),
    ],
)
def test_a_context_shorter_than_the_limit_is_one_line(config, name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    check_context(tmp_path, 64)
    with pytest.raises(ConfigError, match=rf"trainer\.max_length=65: accepted: <= 64, .*{name} in config"):
        check_context(tmp_path, 65)


def test_a_run_tells_what_it_cuts(tmp_path, capsys):
    folder = tiny.save(tmp_path / "model")
    tiny.launch(train.main, [*tiny.small_run(folder, tmp_path / "out"), "trainer.max_length=40", "constraint=weight"])
    told = " ".join(capsys.readouterr().out.split())
    for what in ("12 of 12 reference prompts", "16 of 16 training rows", "13 of 13 prompts"):
        assert f"{what} are longer than trainer.max_length=40 tokens: their prompts are cut from the left" in told
    (run,) = (tmp_path / "out" / "runs").iterdir()
    assert read_json(run / "metrics.json")["training"]["rows_cut"] == 16
    assert all(row["cut"] for row in read_jsonl(run / "generations.jsonl"))
