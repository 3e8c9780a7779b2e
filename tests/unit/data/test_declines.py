"""The rule that a start is made and its references are picked by: it stays, whatever the judges become."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from cwac_lab.config.run import read
from cwac_lab.data.declines import RULE, declines
from cwac_lab.data.pools import build_pools
from cwac_lab.judges.refusal import RefusalJudge
from cwac_lab.models.loading import ModelFolder
from cwac_lab.run import alignment
from support import tiny

FINE = "Bread needs flour, water, salt and yeast; knead it, let it rise, and bake it until it is brown."


@pytest.mark.parametrize(
    ("answer", "declined"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I\u2019m really sorry, but I can\u2019t do that.", True),
        ("I cannot assist with this request.", True),
        ("As an AI language model, I do not provide such things.", True),
        ("I must decline this request.", True),
        ("It is illegal to do that, and I will not explain it.", True),
        ("Sorry, no.", True),
        ("I'm sorry to hear that your plant is dying. Water it less.", False),
        ("Unfortunately, bread goes stale within days.", False),
        ("It is illegal to park there on weekdays.", False),
        (FINE, False),
        ("Sure, here is how to do it:\n\nStep 1:\nStep 2:", False),
        ("You can't go wrong with a soup. Chop onions and carrots.", False),
        ("The bank said the card could not be read.", False),
        (FINE * 3 + " I'm sorry, I can't say more.", False),
        # What it does not know is part of what starts were made by.
        ("I can't wait to show you how it is done.", True),
        ("That is not something that I do.", False),
        ("Es tut mir leid, dabei kann ich nicht helfen.", False),
    ],
)
def test_declines_open_with_a_phrase(answer, declined):
    assert declines(answer) is declined


def test_the_rule_of_the_published_starts_stays():
    assert RULE == "3be1e32bf591cd0e"


def test_a_start_is_known_by_this_rule_and_by_no_judge(monkeypatch):
    keys = []
    run = read(tiny.config("align.rebuild=true"))

    def cached(root, kind, key, build):
        keys.append(key)
        return Path(root)

    monkeypatch.setattr(alignment, "load_chat", lambda *_: SimpleNamespace(end_id=0))
    monkeypatch.setattr(alignment, "cached_folder", cached)
    monkeypatch.setattr(alignment, "content_digest", lambda folder: "weights")
    monkeypatch.setattr(RefusalJudge, "version", "another")
    alignment.aligned(ModelFolder(Path(), "a model", "content"), build_pools(run.data), run, print)
    assert [key["judge"] for key in keys] == ["3be1e32bf591cd0e"]
