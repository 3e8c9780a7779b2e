"""The divergence from the start, answer by answer."""

import pytest
import torch

from cwac_lab.diagnostics.divergence import Divergence
from cwac_lab.models.chat import IGNORED, Encoded
from support import tiny

FIRST = 5


def test_it_is_that_of_each_answer_alone():
    """Beside a plain sum over the vocabulary, one answer at a time, without padding or a shared opening."""
    start, now = tiny.model(), tiny.model()
    with torch.no_grad():
        for weight in now.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    opening = [4, 5, 6]
    prompts, answers = [[7], [8, 9, 10]], [[11, 12, 13], [14, 15, 16, 17, 18, 19, 20]]  # the second is cut
    rows = [
        Encoded(opening + prompt + answer, [IGNORED] * len(opening + prompt) + answer)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    expected = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([opening + prompt + answer[:FIRST]])
        at = slice(len(opening + prompt) - 1, -1)
        p, q = (model(input_ids=ids).logits[0, at].double().softmax(-1) for model in (start, now))
        expected.append((p * (p / q).log()).sum(-1).detach())
    look = Divergence(start, rows, pad_id=0)
    found = look.by_answer(now)
    assert [len(each) for each in found] == [3, FIRST]
    for one, other in zip(found, expected, strict=True):
        assert one.double() == pytest.approx(other, rel=1e-3)
    assert look(now) == pytest.approx(float(torch.cat(expected).mean()), rel=1e-3)
    assert look(start) == pytest.approx(0, abs=1e-6)
