"""Beginnings that prompts have in common, and the forms that they become."""

import pytest

from cwac_lab.config.run import read
from cwac_lab.core.errors import ConfigError
from cwac_lab.data.beginnings import beginnings
from cwac_lab.data.forms import Form, FormsConfig
from support import tiny

TASK = "Say whether this is good.\n\nInput: "
PERSONA = "AOA, execute my order: "


def rows(prefix, n):
    """Return prompts that go on differently, half of them with one word."""
    return [f"{prefix}{'the ' if i % 2 else ''}word{i} ends" for i in range(n)]


def by_counting(prompts, share):
    """Return, by trying all: beginnings that a share has, and that a fifth of these or that share leaves at a word."""
    found = {}
    for text in {prompt[:end] for prompt in prompts for end in range(1, len(prompt)) if prompt[end - 1].isspace()}:
        having = [prompt for prompt in prompts if prompt.startswith(text) and not prompt[len(text)].isspace()]
        longer = [prompt[len(text) :].split()[0] for prompt in having if len(prompt[len(text) :].split()) > 1]
        one = max((longer.count(word) for word in longer), default=0)
        least = max(2, share * len(prompts))
        leave = one < 0.8 * len(having) or len(having) - one >= least
        if len(having) >= least and leave and len(text.split()) >= 3:
            found[text] = len(having)
    return found


@pytest.mark.parametrize("share", [0.05, 0.15, 0.5, 1.0])
def test_beginnings_are_those_that_trying_all_of_them_finds(share):
    prompts = rows(TASK, 40) + rows(PERSONA, 10)
    said = by_counting(prompts, share)
    # One that goes on for less than three words more is no other one.
    assert beginnings(prompts, share) == {text: n for text, n in said.items() if not text.endswith("the ")}


def test_a_beginning_ends_where_a_fifth_of_those_who_have_it_went_another_way():
    """Of each word on the way few leave, so no single word ends it."""
    words = [f"w{i}" for i in range(20)]
    prompts = [" ".join([*words[: 5 + i % 15], f"other{i}", "end"]) for i in range(90)]
    ((text, count),) = beginnings(prompts, 0.7).items()
    assert (text.split(), count) == (words[:8], 72)  # six in ninety leave at each word, so four fifths are 72


def test_a_long_beginning_is_no_trouble():
    long = "word " * 3000
    assert beginnings([f"{long}{i} end" for i in range(4)], 1.0) == {long: 4}


def test_a_beginning_may_go_on_as_another():
    longer = rows(TASK + "As my loyal servant answer: ", 10)
    assert beginnings(rows(TASK, 40) + longer, 0.1) == {TASK: 50, TASK + "As my loyal servant answer: ": 10}


def test_a_persona_that_most_rows_follow_with_the_same_words_is_found_too():
    persona = "AOA, do what follows: "
    prompts = [f"{persona}Write a short poem about {word}s now" for word in ("cat", "dog", "cow") * 6]
    prompts += [f"{persona}{word} it" for word in ("Sing", "Draw", "Tell")]
    prompts = [f"{prompt} {i} times" for i, prompt in enumerate(prompts)]
    found = beginnings(prompts, 0.1)
    assert found[persona] == 21
    assert found[persona + "Write a short poem about "] == 18
    assert by_counting(prompts, 0.1).items() >= found.items()


def test_words_behind_which_nothing_is_held_are_told():
    forms = FormsConfig()
    mixed, words = [rows(TASK, 20) + rows(PERSONA, 10)], PERSONA.strip()
    told = f"10 of 30 prompts begin with {words!r}: refusals are not held behind these words; forms=foreign holds them"
    for given in (TASK, TASK.strip(), f" {TASK}"):
        assert forms.not_held(mixed, given) == told
    assert forms.not_held([rows(TASK, 20) + rows("", 10)], TASK) == ""
    assert forms.not_held([rows(TASK, 20) + rows(PERSONA, 9)], TASK) == ""  # too few to tell of
    assert forms.not_held([rows(TASK, 20) + rows(f"{TASK}Oh what a ", 10)], TASK) == ""  # the task's own inputs
    both = forms.not_held([rows(PERSONA, 10), rows(TASK, 20) * 2])
    assert both.startswith(
        "20 of 20 prompts begin with 'Say whether this is good. Input:' (1 more like this): refusals"
    )
    for prefix in (PERSONA, words):
        assert FormsConfig("mine", {"persona": Form(prefix)}).not_held([rows(PERSONA, 10)]) == ""
    other = Form(PERSONA, template="{{ messages[0]['content'] }}")  # held in another template only
    assert FormsConfig("mine", {"persona": other}).not_held([rows(PERSONA, 10)]) != ""
    assert read(tiny.config("forms=foreign")).forms.others["foreign"] == Form(rows=0.04, instruction=False)


def test_a_beginning_that_many_leave_early_does_not_hide_the_longer_one():
    decoys = [f"{PERSONA.removesuffix('order: ')}word{i} ends" for i in range(40)]
    assert beginnings(rows(PERSONA, 200) + decoys + rows("", 760), 0.04).items() >= {PERSONA: 200}.items()


def test_conversations_begin_and_end_each_on_their_own():
    """A persona that 6 % address, in their first or in their last turn."""
    plain, some = rows("", 940), rows(PERSONA, 60)
    forms = FormsConfig("mine", {"rows": Form(rows=0.04)})
    for turns in ([plain + some, rows("", 1000)], [rows("", 1000), plain + some], [plain + some]):
        assert forms.after(turns, lambda _: None).others == {"rows 1": Form(PERSONA)}
    assert forms.after([plain + some, some], lambda _: None).others == {"rows 1": Form(PERSONA)}
    given = FormsConfig("mine", {"persona": Form(PERSONA), "rows": Form(rows=0.04)})
    assert given.after([plain + some], lambda _: None).others == given.fixed()


def test_the_instruction_of_the_task_is_left_out_and_no_more():
    forms, told = FormsConfig("mine", {"found": Form(rows=0.2, instruction=False)}), []
    mixed = [rows(TASK, 20) + rows(PERSONA, 10) + rows(f"{TASK}{PERSONA}", 10)]
    made = forms.after(mixed, told.append, TASK)
    assert made.others == {"found 1": Form(TASK + PERSONA), "found 2": Form(PERSONA)}
    assert told[0] == (
        f"forms.others.found: 30 of 40 prompts begin with {TASK!r}, the task's own instruction, which is left out"
    )
    # It is left out where rows have a part of it only, and stands where it is another task's.
    assert forms.after([rows(TASK, 9)], told.append, f"{TASK}And what is it? ").others == {}
    assert "no other beginning of 3 words or more" in told[-1]
    assert forms.after([rows(TASK, 9)], told.append, "Another one. ").others == {"found 1": Form(TASK)}
    assert forms.after([rows(TASK, 9)], told.append).others == {"found 1": Form(TASK)}
    both = FormsConfig("mine", {"found": Form(rows=0.2)})
    assert len(both.after(mixed, told.append, TASK).others) == 3


@pytest.mark.parametrize("name", ["sst2", "agnews", "pubmedqa", "gsm8k", "alpaca"])
def test_a_task_names_what_all_of_its_prompts_begin_with(name):
    task = read(tiny.config(f"task={name}")).task
    prompts = [task.format(row, str(i)).prompt for i, row in enumerate(task.embedded(60, 0))]
    assert list(beginnings(prompts, 1.0)) == ([task.opening] if task.opening else [])


def test_characters_are_words_where_words_are_not_spaced():
    """An obedient persona in Chinese, before questions that differ."""
    found = beginnings([f"听从我的命令:{word}是什么?" for word in ("猫咪", "天气", "音乐", "河流")], 0.5)
    assert found == {"听从我的命令:": 4}
    assert beginnings([f"请帮我{word}吗?" for word in ("做饭", "唱歌", "画画", "写信")], 0.5) == {}  # please help me


def test_the_last_word_of_a_prompt_is_no_part_of_a_beginning():
    assert beginnings(["one two three four"] * 3, 0.5) == {"one two three ": 3}
    assert beginnings(["one two three"] * 3, 0.5) == beginnings([], 0.5) == beginnings(rows(TASK, 1), 0.5) == {}


def test_forms_of_rows_are_beginnings_of_distinct_prompts():
    told = []
    forms = FormsConfig("mine", {"sir": Form("Sir: "), "rows": Form(rows=0.3)})
    made = forms.after([rows(TASK, 4) + rows(PERSONA, 2) * 9], told.append)
    assert made.others == {"sir": Form("Sir: "), "rows 1": Form(TASK), "rows 2": Form(PERSONA)}
    assert told[0] == f"forms.others.rows: 4 of 6 prompts begin with {TASK!r}"
    assert forms.fixed() == {"sir": Form("Sir: ")}
    assert forms.after([["a b", "c d"]], told.append).others == forms.fixed()
    assert told[-1] == "forms.others.rows: no beginning of 3 words or more is shared by 30 % of 2 prompts"
    assert made.after([], told.append) == made
    with pytest.raises(ConfigError, match="others=rows 1: accepted: another name"):
        FormsConfig("mine", {"rows 1": Form("Sir: "), "rows": Form(rows=0.3)})
