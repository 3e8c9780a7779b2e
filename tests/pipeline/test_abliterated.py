"""A run whose model is abliterated after fine-tuning: what is asked is the edited model, what is saved is not."""

import pytest

from cwac_lab import train
from cwac_lab.core.cache import read_json
from support import tiny

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made(tiny_folder, tmp_path_factory):
    """The folders of a run, and of the same one under the attack."""
    where, found = tmp_path_factory.mktemp("abliterated"), {}
    for attack in ("mixed", "abliterate"):
        given = [*tiny.small_run(tiny_folder, where), "constraint=none"]
        root = where / attack
        more = (f"attack={attack}", f"output_root={root}", f"cache_root={where}/cache", "trainer.export=true")
        tiny.launch(train.main, [*given, *more])
        (found[attack],) = (root / "runs").iterdir()
    return found


def test_the_record_says_what_was_taken_out(made):
    found = read_json(made["abliterate"] / "metrics.json")["abliterated"]
    assert found["layer"] in {each["layer"] for each in found["tried"]}
    assert all(0 <= each["refusing"] <= 1 + 1e-6 for each in found["tried"])
    assert "abliterated" not in read_json(made["mixed"] / "metrics.json")


def test_what_is_saved_is_the_model_before_the_attack(made):
    name = "model/model.safetensors"
    assert (made["abliterate"] / name).read_bytes() == (made["mixed"] / name).read_bytes()


def test_too_few_prompts_of_the_attacker_are_one_line(tiny_folder, tmp_path, capsys):
    given = [*tiny.small_run(tiny_folder, tmp_path), "attack=abliterate", "constraint=none", "harmful_ratio=0"]
    with pytest.raises(SystemExit):
        tiny.launch(train.main, [*given, "data.harmful.finetune.requests=3"])
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line == "error: attack.abliterate=True: accepted: false, or >= 4 prompts in data.harmful.finetune"


def test_what_is_measured_afterwards_is_the_attacked_model(tiny_folder, tmp_path):
    """Perplexity that a finished run lacks is that of the edited weights, as it is where it is measured at once."""
    text = tmp_path / "plain.txt"
    text.write_text("one line of text\n\nanother one, of more words\n\nthe third of them\n")
    shared = [*tiny.small_run(tiny_folder, tmp_path), "constraint=none", "trainer.export=true"]
    measured = ("evaluation.perplexity=true", f"evaluation.plain_text={text}")
    found = {}
    for name, runs in {
        "plain": (measured,), "at once": ("attack=abliterate", measured), "later": ("attack=abliterate", (), measured)
    }.items():  # fmt: skip
        attack = [each for each in runs if isinstance(each, str)]
        root = tmp_path / name.replace(" ", "_")
        for more in (each for each in runs if not isinstance(each, str)):
            settings = [f"output_root={root}", f"cache_root={tmp_path}/cache", *attack, *more]
            tiny.launch(train.main, [*shared, *settings])
        (run,) = (root / "runs").iterdir()
        found[name] = read_json(run / "metrics.json")["perplexity"]["value"]
    assert found["later"] == pytest.approx(found["at once"], rel=1e-5)
    assert found["plain"] != pytest.approx(found["at once"], rel=1e-5)


def test_the_start_is_not_attacked(tiny_folder, tmp_path, capsys):
    given = [*tiny.small_run(tiny_folder, tmp_path), "attack=abliterate", "finetune=false"]
    with pytest.raises(SystemExit):
        tiny.launch(train.main, given)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: attack.abliterate=True: accepted: false with finetune=false")
