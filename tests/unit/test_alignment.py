import tiny
from cwac_lab import config
from cwac_lab.data.sources import PromptRow
from cwac_lab.evaluation.generate import Answer
from cwac_lab.training import alignment


def test_own_answers_leave_out_refusals_and_end_only_where_the_model_ended(monkeypatch, tmp_path, tiny_folder):
    chat = tiny.chat()
    given = {
        "one": Answer("Here are some trips:", ended=False), "two": Answer("a trip", ended=True),
        "three": Answer("I'm sorry, but I can't help with that.", ended=True), "four": Answer("", ended=True),
    }  # fmt: skip
    monkeypatch.setattr(alignment, "answers", lambda model, chat, prompts, *_: [given[prompt] for prompt in prompts])
    run = config.read(tiny.config(*tiny.small_run(tiny_folder, tmp_path), "constraint=none"))
    rows = [PromptRow(name, name) for name in given]
    found = alignment.own_answers(tiny.model(), chat, rows, run)
    assert len(found) == 2
    for example, prompt in zip(found, ("one", "two"), strict=True):
        tail = example.input_ids[len(chat.prompt_ids(prompt)) :]
        assert chat.decode(tail) == given[prompt].text
        assert (tail[-1] == chat.end_id) == given[prompt].ended
        assert [label for label in example.labels if label >= 0] == tail
