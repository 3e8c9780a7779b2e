import tiny
from cwac_lab import config
from cwac_lab.data.sources import PromptRow
from cwac_lab.training import alignment


def test_own_answers_leave_out_refusals_and_end_only_where_the_model_ended(monkeypatch, tmp_path, tiny_folder):
    chat = tiny.chat()
    cut, whole = "a fine film and a trip " * 3, "a trip"
    longest = len(chat.tokenizer(cut.strip())["input_ids"])
    given = {"one": cut.strip(), "two": whole, "three": "I'm sorry, but I can't help with that.", "four": ""}
    monkeypatch.setattr(alignment, "generate", lambda model, chat, prompts, *_: [given[prompt] for prompt in prompts])
    run = config.read(
        tiny.config(*tiny.small_run(tiny_folder, tmp_path), "constraint=none", f"align.answer_tokens={longest}")
    )
    rows = [PromptRow(name, name) for name in given]
    first, second = alignment.own_answers(tiny.model(), chat, rows, run)
    for example, prompt, answer, ends in ((first, "one", cut.strip(), False), (second, "two", whole, True)):
        tail = example.input_ids[len(chat.prompt_ids(prompt)) :]
        assert chat.decode(tail) == answer
        assert (tail[-1] == chat.end_id) == ends
        assert [label for label in example.labels if label >= 0] == tail
