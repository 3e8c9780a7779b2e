"""Which of two recorded runs answers the task's rows better, by a stand-in for a server."""

import pytest
from omegaconf import OmegaConf

from cwac_lab import evaluate
from cwac_lab.core.stats import wilson
from cwac_lab.report.grouping import records
from cwac_lab.report.tables import markdown, numbers, summary
from cwac_lab.results import archive, load
from cwac_lab.results.store import runs
from cwac_lab.run.preference import setting_of
from support import tiny
from support.chat_server import reply, standing
from support.recorded import record


@pytest.fixture
def stand():
    with standing() as found:
        yield found


def answering(root, constraint, answers, seed=0):
    """A recorded run with answers to rows of the task, and one to a prompt."""
    run = record(root, constraint, 0.2, seed, 10)
    made = "finetune=false" if constraint == "start" else f"constraint={constraint}"
    config = OmegaConf.to_container(tiny.config(made, f"output_root={root}"), resolve=True)
    run.write("config.json", config)
    rows = [{"kind": "task", "id": str(n), "prompt": f"Why {n}?", "output": said} for n, said in enumerate(answers)]
    run.write("generations.jsonl", [*rows, {"kind": "harmful", "id": "h", "prompt": "No?", "output": "No."}])
    return run


def longer(body, number):
    """Prefer the longer answer; say nothing where there is a question mark in one."""
    text = body["messages"][0]["content"]
    first, second = (text.split(f"[Answer {name}]\n")[1].split("\n[End of answer")[0] for name in "AB")
    return reply("" if "?" in first + second else f"[[{'A' if len(first) > len(second) else 'B'}]]")


def ask(run, other, stand, *more):
    given = [f"run={run.path}", f"against={other.path}", f"endpoint.url={stand.url}", "endpoint.model=m", *more]
    tiny.launch(evaluate.main, given, "evaluate")


def test_runs_that_differ_in_more_than_a_seed_are_others(tmp_path):
    """What changes no result, and how a run is called, makes no other one."""
    run = answering(tmp_path, "weight", ["a"])
    config = run.read("config.json")

    def setting(**changes):
        run.write("config.json", config | changes)
        return setting_of(run)

    same = setting()
    assert same == setting(seed=7) == setting(label="mine") == setting(force=True)
    assert same == setting(trainer=config["trainer"] | {"progress_bar": False})
    others = {
        setting(guard=config["guard"] | {"kl": 0.1}),
        setting(data=config["data"] | {"n_train": 7}),
        setting(forms={"name": "mine", "others": {"sir": {"prefix": "Sir: "}}}),
    }
    assert len(others | {same}) == 4


def test_the_win_rate_over_the_start_is_told_recorded_and_a_column(stand, tmp_path, capsys):
    stand.says = longer
    start = answering(tmp_path, "start", ["a b c", "a", "same", "why?"])
    run = answering(tmp_path, "weight", ["a", "a b c d", "same", "hm"])
    ask(run, start, stand)
    shown = " ".join(capsys.readouterr().out.split())
    assert "win rate over start" in shown
    assert "n=3: 1 wins, 1 ties (0 as the two orders disagree), 1 losses, 1 without a verdict" in shown
    assert "6 requests, 0 replies from the cache" in shown
    told = run.facts()["win_rates"]["start"]
    assert (told["value"], told["low"], told["n"]) == (50.0, wilson(1.5, 3).low, 3)
    assert told["judge"].startswith("m ")
    ask(run, start, stand)
    assert "2 requests, 4 replies from the cache" in " ".join(capsys.readouterr().out.split())  # silence is not kept
    found = records(runs(tmp_path))
    assert "win rate over start, % ↑" in markdown(summary(found))
    line = numbers(found).query("constraint == 'weight'").to_dict("records")[0]
    assert (line["win_rate_over_start"], line["win_rate_over_start_n"]) == (50.0, 3)
    archive.add(tmp_path / "kept", list(runs(tmp_path)), force=False, say=print)
    assert records(runs(tmp_path / "kept"))[-1]["win_rates"]["start"]["value"] == 50.0
    assert len(load(tmp_path)) == 2


def test_what_cannot_be_compared_is_said_before_the_server_is_asked(stand, tmp_path, capsys):
    run, other = answering(tmp_path, "none", ["a", "b"]), answering(tmp_path, "weight", ["a"])
    for against, more, said in (
        (run, (), "accepted: another run than run="),
        (other, (), "the two runs answer 2 and 1 rows of the task, and share 1"),
        (other, ("judges=[refusal]",), "judges=['refusal']: accepted: null with against"),
        (record(tmp_path, "coupled", 0.2, 0, 1), (), "no finished run with generations.jsonl there"),
    ):
        with pytest.raises(SystemExit):
            ask(run, against, stand, *more)
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
    assert stand.asked == []
