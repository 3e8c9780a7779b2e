import pytest

import tiny
from cwac_lab import references as module
from cwac_lab.config import read
from cwac_lab.data.pools import build_pools
from cwac_lab.data.responses import refusal
from cwac_lab.errors import QualityError
from cwac_lab.evaluation.generate import Answer
from cwac_lab.references import references


def setting(tmp_path, tiny_folder, *overrides):
    run = read(tiny.config(*tiny.small_run(tiny_folder, tmp_path), "constraint=weight", *overrides))
    return run, build_pools(run.data)


def found(run, pools):
    return references(run, pools, "content", tiny.model(), tiny.chat(), lambda text: None)


def texts(pairs):
    return [tiny.chat().encode(*pair).input_ids for pair in pairs]


@pytest.fixture
def asked(monkeypatch):
    """The start model refuses every second prompt; what it was asked is noted."""
    seen = []

    def answer(model, chat, prompts, max_new_tokens, batch_size):
        seen.append(list(prompts))
        ended = max_new_tokens > 5
        return [
            Answer("I can't help with that." if i % 2 else "Sure.", ended=ended, first=5) for i in range(len(prompts))
        ]

    monkeypatch.setattr(module, "answers", answer)
    return seen


@pytest.mark.parametrize("align", ["none", "refusals"])
def test_prompts_that_are_answered_are_left_out(align, asked, tmp_path, tiny_folder):
    run, pools = setting(tmp_path, tiny_folder, "data.reference=refused", f"model.align={align}")
    held = found(run, pools)
    reference, taught = pools.get("harmful", "reference"), pools.get("harmful", "alignment")
    assert held.harmful == reference[1::2]
    assert held.asked == len(reference)
    assert held.benign == pools.get("harmless", "reference")
    own = reference if align == "refusals" else reference + taught
    assert asked == [[row.prompt for row in own]]
    expected = texts([(row.prompt, "I can't help with that.") for row in own[1::2]])
    if align == "refusals":  # it was taught exactly these
        expected += texts([(row.prompt, refusal(row)) for row in taught])
    assert held.refusals == expected
    assert found(run, pools) == held
    assert len(asked) == 1  # the answers are cached


def test_a_refusal_that_was_cut_has_no_end_of_turn(asked, tmp_path, tiny_folder):
    for longest, whole in ((6, True), (5, False)):
        run, pools = setting(
            tmp_path, tiny_folder, "data.reference=refused", "model.align=none", f"align.answer_tokens={longest}"
        )
        ends = {conversation[-1] == tiny.chat().end_id for conversation in found(run, pools).refusals}
        assert ends == {whole}


def test_all_prompts_can_be_held(asked, tmp_path, tiny_folder):
    run, pools = setting(tmp_path, tiny_folder, "data.reference=all")
    held = found(run, pools)
    assert held.harmful == pools.get("harmful", "reference")
    assert held.refusals == texts(
        [(row.prompt, refusal(row)) for row in held.harmful + pools.get("harmful", "alignment")]
    )
    assert asked == []


def test_a_model_that_refuses_nothing_is_an_error(tmp_path, tiny_folder):
    run, pools = setting(tmp_path, tiny_folder, "data.reference=refused")
    with pytest.raises(QualityError, match=r"refuses none of the 6 .* model.align=refusals, or data.reference=all"):
        found(run, pools)
