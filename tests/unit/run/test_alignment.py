from cwac_lab.config import run as config
from cwac_lab.data.sources import PromptRow
from cwac_lab.evaluation.generate import Answer
from cwac_lab.run import alignment
from support import tiny

DECLINED = "I'm sorry, but I can't help with that."


def test_own_answers_avoid_declines_and_end_only_where_the_model_ended(monkeypatch, tmp_path, tiny_folder):
    chat = tiny.chat()
    first = {
        "one": Answer("Here are some trips:", False, 5), "two": Answer("a trip", True, 6),
        "three": Answer(DECLINED, True, 7), "four": Answer("", True, 8), "five": Answer(DECLINED, True, 9),
    }  # fmt: skip
    again = {"three": Answer("Pack light.", True, 5), "five": Answer("Well, " + DECLINED, True, 6)}

    def answers(model, chat, prompts, max_new_tokens, batch_size, not_first=()):
        assert set(not_first) in (set(), {7, 9})
        return [(again if not_first else first)[prompt] for prompt in prompts]

    monkeypatch.setattr(alignment, "answers", answers)
    run = config.read(tiny.config(*tiny.small_run(tiny_folder, tmp_path), "constraint=none"))
    found = alignment.own_answers(tiny.model(), chat, [PromptRow(name, name) for name in first], run)
    expected = {"one": first["one"], "two": first["two"], "three": again["three"]}
    assert len(found) == len(expected)
    for example, (prompt, answer) in zip(found, expected.items(), strict=True):
        tail = example.input_ids[len(chat.prompt_ids(prompt)) :]
        assert chat.decode(tail) == answer.text
        assert (tail[-1] == chat.end_id) == answer.ended
        assert [label for label in example.labels if label >= 0] == tail
