"""What a run tells of general ability: within it, and made up for a finished one."""

import math
import shutil

import pytest

from cwac_lab import train
from cwac_lab.config.run import read
from cwac_lab.core.cache import read_json, write_json
from cwac_lab.data import plain_text
from cwac_lab.evaluation import plain
from cwac_lab.results.store import runs
from cwac_lab.run import ability, stages
from support import tiny
from support.harness import INSTALLED, WHY_NOT, stand_in, task_folder

pytestmark = pytest.mark.slow

# A tiny model with few prompts has no free direction at the default energy.
MOVES = ("trainer.learning_rate=1e-2", "constraint.weight.energy=0.9")
TEXT = "A first text of some words.\n\nThe second one, which is a bit longer.\n\nA third.\n"


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A text and a folder of tasks."""
    folder = tmp_path_factory.mktemp("given")
    (folder / "plain.txt").write_text(TEXT)
    return folder, task_folder(folder / "tasks")


def asked(given, limit=5):
    folder, tasks = given
    text = ["evaluation.perplexity=true", f"evaluation.plain_text={folder / 'plain.txt'}"]
    return text, [
        "evaluation.lm_eval=[twenty]",
        f"evaluation.lm_eval_tasks={tasks}",
        f"evaluation.lm_eval_limit={limit}",
    ]


@pytest.fixture(scope="module")
def store(tiny_folder, tmp_path_factory, given):
    """Runs with all of it, of one start; and one without any."""
    where = tmp_path_factory.mktemp("store")
    shared = [*tiny.small_run(tiny_folder, where), "constraint=weight", *MOVES]
    text, tasks = asked(given)
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch)
        tiny.launch(train.main, [*shared, "seed=0", *text, *tasks])
        tiny.launch(train.main, [*shared, "seed=1"])
        tiny.launch(train.main, [*shared, "finetune=false", *text])
    return where


def of_seed(where, part):
    return next(run for run in runs(where) if part in run.path.name)


def test_a_run_tells_what_it_forgot(store, tiny_folder):
    found = of_seed(store, "-s0-").facts()
    texts = TEXT.strip().split("\n\n")
    now, before = found["perplexity"], found["perplexity_start"]
    assert (now["n"], before["n"], found["plain_text"]) == (3, 3, plain_text.content(texts))
    assert found["forgetting"]["value"] == pytest.approx(math.log(now["value"] / before["value"]), abs=1e-6)
    assert abs(found["forgetting"]["value"]) > 1e-3  # it was trained
    start = of_seed(store, "-start-").facts()
    assert start["perplexity"] == pytest.approx(before)
    assert "forgetting" not in start
    assert {"plain_text", "lm_eval"} <= found["stages"].keys()
    losses = plain.losses(tiny.model(), tiny.chat(), texts, 2)
    assert before["value"] == pytest.approx(plain.perplexity(losses).value, rel=1e-4)


def test_a_start_is_measured_once(store, given, tiny_folder, monkeypatch):
    run = read(tiny.config(*tiny.small_run(tiny_folder, store), "constraint=none", *asked(given)[0]))
    content = of_seed(store, "-s0-").facts()["weights_content"]
    monkeypatch.setattr(plain, "losses", lambda *_: pytest.fail("it was measured again"))
    found = ability.start_losses(run, content, tiny.model(), tiny.chat(), pytest.fail)
    assert plain.perplexity(found).to_dict() == of_seed(store, "-s0-").facts()["perplexity_start"]


def test_a_run_tells_how_much_of_unseen_harmful_prompts_is_held(store):
    found = of_seed(store, "-s0-").facts()
    assert 0 < found["held_share"] < 1
    assert found["held_share"] == read_json(next((store / "cache" / "held_share").glob("[0-9a-f]*")) / "share.json")
    assert "held_share" not in of_seed(store, "-start-").facts()


@pytest.fixture
def again(store, tiny_folder, tmp_path, monkeypatch):
    """Ask for a run of a copy of the store again; training is a mistake."""
    shutil.copytree(store, tmp_path / "store")
    monkeypatch.setattr(stages, "carry_through", lambda *_: pytest.fail("it was carried out"))
    shared = [*tiny.small_run(tiny_folder, tmp_path / "store"), "constraint=weight", *MOVES]

    def ask(part, *more):
        tiny.launch(train.main, [*shared, *more])
        return of_seed(tmp_path / "store", part)

    return ask


def test_what_is_there_is_not_measured_again(again, given, monkeypatch):
    calls = stand_in(monkeypatch)
    text, tasks = asked(given)
    run = again("-s0-", "seed=0", *text, *tasks)
    assert calls == []
    assert run.facts()["lm_eval"]["asked"] == ["twenty"]


def test_a_finished_run_is_made_up_for_from_its_saved_model(again, given, monkeypatch):
    calls = stand_in(monkeypatch)
    text, tasks = asked(given, limit=7)
    before = again("-s1-", "seed=1").facts()
    assert not {"perplexity", "lm_eval"} & before.keys()
    found = again("-s1-", "seed=1", *text, *tasks).facts()
    assert {name: found[name] for name in before} == before
    assert found["lm_eval"]["tasks"]["twenty"]["acc,none"]["n"] == 7
    card = (again("-s1-", "seed=1").path / "model" / "README.md").read_text()
    assert "| forgetting, nats a token ↓ |" in card
    assert "| twenty (acc,none), % ↑ |" in card
    within = again("-s0-", "seed=0").facts()
    assert found["perplexity_start"] == pytest.approx(within["perplexity_start"])
    assert len(calls) == 1


def test_after_a_run_it_is_as_within_it(again, given):
    run = again("-s0-", "seed=0")
    within = run.read("metrics.json")
    made = ("perplexity", "perplexity_start", "forgetting", "plain_text")
    write_json(run.path / "metrics.json", {name: value for name, value in within.items() if name not in made})
    after = again("-s0-", "seed=0", *asked(given)[0]).facts()
    for name in made[:3]:
        assert after[name] == pytest.approx(within[name], rel=1e-4, abs=1e-6), name


def test_another_text_is_measured_anew(again, given, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("Quite another text.\n\nAnd more of it.\n")
    run = again("-start-", "finetune=false", "evaluation.perplexity=true", f"evaluation.plain_text={other}")
    assert (run.facts()["perplexity"]["n"], "forgetting" in run.facts()) == (2, False)


def test_without_a_model_it_is_told(again, given, monkeypatch, capsys):
    stand_in(monkeypatch)
    text, tasks = asked(given)
    shutil.rmtree(again("-s1-", "seed=1").path / "model")
    with pytest.raises(SystemExit):
        again("-s1-", "seed=1", "trainer.export=false", *text, *tasks)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "has no perplexity of that text (evaluation.perplexity=true)" in line
    assert "and no results of all these tasks (evaluation.lm_eval=[twenty]): force=true repeats the run" in line


def test_a_harness_that_fails_loses_nothing(tiny_folder, tmp_path, given, monkeypatch, capsys):
    shared = [*tiny.small_run(tiny_folder, tmp_path), "constraint=none", "seed=0", *asked(given)[1]]
    stand_in(monkeypatch, ConnectionError("no hub here"))
    with pytest.raises(SystemExit):
        tiny.launch(train.main, shared)
    said = capsys.readouterr()
    (line,) = said.err.strip().splitlines()
    assert line.endswith(
        "is recorded without evaluation.lm_eval=[twenty], which failed as told above; and the same command asks the "
        "saved model again"
    )
    assert "lm_eval failed (ConnectionError: no hub here)" in " ".join(said.out.split())
    run = of_seed(tmp_path, "-s0-")
    assert (run.status, "lm_eval" in run.facts()) == ("ok", False)
    stand_in(monkeypatch)
    tiny.launch(train.main, shared)
    assert of_seed(tmp_path, "-s0-").facts()["lm_eval"]["tasks"]["twenty"]["acc,none"]["n"] == 5


@pytest.mark.skipif(not INSTALLED, reason=WHY_NOT)
def test_a_run_asks_the_harness_itself(tiny_folder, tmp_path, given):
    tiny.launch(train.main, [*tiny.small_run(tiny_folder, tmp_path), "constraint=none", *asked(given, limit="null")[1]])
    (run,) = runs(tmp_path)
    told = run.facts()["lm_eval"]
    assert (told["asked"], told["tasks"]["twenty"]["acc,none"]["n"]) == (["twenty"], 20)
