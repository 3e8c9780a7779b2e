"""Runs under a guard: it watches reference prompts, ends the run early, and the record says so."""

import pytest

from cwac_lab import train
from cwac_lab.core.cache import read_json
from support import tiny

pytestmark = pytest.mark.slow

SHARED = ("constraint=none", "trainer.epochs=2", "trainer.learning_rate=1e-3", "guard.every_n_steps=3")


def run(folder, where, *more):
    given = [*tiny.small_run(folder, where), *SHARED, f"output_root={where}", *more]
    tiny.launch(train.main, given)
    (made,) = (where / "runs").iterdir()
    return made


def test_a_run_ends_where_its_guard_says_so(tiny_folder, tmp_path, capsys):
    free = read_json(run(tiny_folder, tmp_path / "free", "guard.kl=100") / "metrics.json")
    steps, looks = free["training"]["steps"], free["guard"]["looks"]
    assert [step for step, _ in looks] == [3, 6, 8]
    assert (free["guard"]["ended"], steps) == (None, 8)
    assert all(kl > 0 for _, kl in looks)
    capsys.readouterr()
    made = run(tiny_folder, tmp_path / "held", f"guard.kl={0.9 * looks[0][1]}", "guard.do=rollback")
    found = read_json(made / "metrics.json")
    assert found["guard"]["looks"] == looks[:1]
    assert (found["guard"]["ended"], found["guard"]["rolled_back_to"]) == (3, 0)
    assert found["training"]["steps"] == 3
    assert found["training"]["answer_tokens"] < free["training"]["answer_tokens"]
    assert "guard: training ended after 3 steps, with the weights after 0" in capsys.readouterr().out
    assert not (made / "guard").exists()


def test_a_guard_without_prompts_to_watch_is_one_line(tiny_folder, tmp_path, capsys):
    given = [*tiny.small_run(tiny_folder, tmp_path), *SHARED, "guard.kl=0.1", "data.harmful.reference.requests=0"]
    with pytest.raises(SystemExit):
        tiny.launch(train.main, given)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line == "error: guard.kl=0.1: accepted: null, or >= 1 prompts in data.harmful.reference to watch"
