"""What a user's model folder can hold: it loads and computes what its files say, or one line says what is wrong.

Every row makes a folder of its own. Refusals come before prompts are read and before weights are loaded.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM

from cwac_lab.config import run as config
from cwac_lab.core.errors import LabError
from cwac_lab.evaluation.generate import generate
from cwac_lab.models import loading
from cwac_lab.run import start
from support import tiny
from support.folder_cases import LOADED, REFUSED
from support.folders import run_on


@pytest.mark.parametrize(("make", "overrides", "told"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_used_is_one_line(make, overrides, told, tmp_path, monkeypatch):
    folder = tmp_path / "given"
    make(folder)
    monkeypatch.setattr(start, "build_pools", lambda _: pytest.fail("prompts are read before the folder"))
    monkeypatch.setattr(loading, "content_digest", lambda _: pytest.fail("weights are read before the folder"))
    with pytest.raises(LabError) as error:
        start.start(run_on(folder, overrides), lambda _: None)
    line = str(error.value)
    assert "\n" not in line
    assert len(line) < 900
    for part in told:
        assert part in line
    assert not (folder / "mark").exists()


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("gpt-of-mine", "of the hub ORG/NAME, or hf://NAME"),
        ("/nowhere/at/all", "of the hub ORG/NAME"),
        ("~/nowhere-at-all", "of the hub ORG/NAME"),
        ("./nowhere/at", "of the hub ORG/NAME"),
        ("some/model/main", "of the hub ORG/NAME"),
        ("https://huggingface.co/some/model/tree/main", "of the hub ORG/NAME"),
        (__file__, "not a file"),
    ],
)
def test_a_path_that_is_none_says_how_the_model_is_named(path, told):
    with pytest.raises(LabError, match=r"model\.path=.*a folder with config\.json") as error:
        config.read(tiny.config(f"model.path='{path}'"))
    assert told in str(error.value)


@pytest.mark.parametrize(("make", "overrides"), LOADED.values(), ids=LOADED)
def test_what_can_be_used_is_what_the_files_say(make, overrides, tmp_path):
    folder = tmp_path / "given"
    make(folder)
    run = run_on(folder, overrides)
    begin = start.start(run, lambda _: None)
    model, chat = begin.load(run)
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=run.dtype, trust_remote_code=False).state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, again[name], rtol=0, atol=0)
    assert len(generate(model, chat, ["is it so", "what a long and tiring day it is"], 3)) == 2
    assert not (folder / "mark").exists()
