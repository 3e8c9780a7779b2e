"""The judge at an endpoint: its settings, rubrics and version, and a finished run that it judges."""

import json
import math
import re
from copy import deepcopy

import pytest
from omegaconf import OmegaConf

from cwac_lab import evaluate
from cwac_lab.config.run import check_machine, read
from cwac_lab.core.cache import digest
from cwac_lab.judges import endpoint, rubric
from cwac_lab.results import load
from cwac_lab.run.identity import run_key
from support import tiny
from support.chat_server import KEY, PAIRS, error_of, grades, judge, reply
from support.recipes import parts, plain
from support.recorded import record

BAD = [
    ("url=localhost:8000", "url=localhost:8000: accepted: http://HOST/PATH or https://HOST/PATH"),
    ("url='http://host:port/v1'", "url=http://host:port/v1: accepted: http://HOST/PATH"),
    (f"url='http://me:{KEY}@host/v1'", "url=(not shown): accepted: http://HOST/PATH"),
    (f"url='http://host/v1?key={KEY}'", "url=(not shown): accepted: http://HOST/PATH"),
    (
        "url=null",
        "url=None: accepted: the address of a server, e.g. http://localhost:8000/v1: the judge endpoint needs",
    ),
    ("model=null", "model=None: accepted: a model: the judge endpoint needs it"),
    (f"key_env={KEY}", "key_env=(not shown): accepted: the name of an environment variable in capitals, not the key"),
    ("timeout_s=0", "timeout_s=0.0: accepted: a number in (0, inf)"),
    ("retries=-1", "retries=-1: accepted: a number in [0, inf)"),
    ("concurrency=0", "concurrency=0: accepted: a number in [1, inf)"),
    ("max_tokens=0", "max_tokens=0: accepted: a number in [1, inf)"),
    ("rubric=mine", "rubric=mine: accepted: strongreject, or the path of one (No such file or directory)"),
    ("token=a", "token=a: accepted: one of the keys url, model, rubric"),
]


@pytest.mark.parametrize(("wrong", "line"), BAD)
def test_bad_settings_are_one_line_before_anything_is_loaded(wrong, line):
    given = {"url": "http://localhost:1/v1", "model": "m"}
    settings = [f"evaluation.endpoint.{name}={value}" for name, value in given.items()]
    added = "+" if wrong.startswith("token") else ""
    config = tiny.config("evaluation.judges=[endpoint]", *settings, f"{added}evaluation.endpoint.{wrong}")
    told = error_of(lambda: check_machine(read(config)))
    assert told.startswith(f"evaluation.endpoint.{line}")
    assert KEY not in told


def test_a_finished_run_keeps_its_key():
    """Also one of before there were endpoints: who judges changes no answer."""
    settings = read(tiny.config("evaluation.judges=[refusal]")).resolved
    before = deepcopy(settings)
    del before["evaluation"]["endpoint"]
    given = ["evaluation.endpoint.url=http://localhost:1/v1", "evaluation.endpoint.model=m"]
    asked = read(tiny.config("evaluation.judges=[refusal,endpoint]", *given)).resolved
    assert run_key(before, {}) == run_key(settings, {}) == run_key(asked, {})


RUBRIC = {"system": "Grade.", "user": "{prompt} | {answer} | JSON with refused", "asks": ["refused"]}


def test_a_rubric_of_ones_own(stand, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps(RUBRIC))
    stand.says = lambda body, number: reply('{"refused": 1}')
    found = judge(stand, tmp_path, rubric=str(path))
    (verdict,) = found.verdicts(PAIRS[:1])
    assert (verdict.refused, verdict.complied) == (1, 0)
    assert math.isnan(verdict.harmfulness)
    assert stand.asked[0]["messages"][1]["content"] == f"{PAIRS[0][0]} | {PAIRS[0][1]} | JSON with refused"
    before = found.version
    assert before != judge(stand, tmp_path).version
    path.write_text(json.dumps({**RUBRIC, "system": "Grade well."}))
    assert judge(stand, tmp_path, rubric=str(path)).version != before


@pytest.mark.parametrize(
    "text",
    [
        "a: [",
        "just words",
        json.dumps({**RUBRIC, "asks": ["refused", "specific"]}),
        json.dumps({**RUBRIC, "user": "{prompt} only"}),
        json.dumps({**RUBRIC, "system": None}),
        json.dumps({**RUBRIC, "more": 1}),
        json.dumps({"system": "s", "user": "{prompt}{answer}"}),
    ],
)
def test_a_wrong_rubric_is_one_line(text, tmp_path):
    (tmp_path / "mine.yaml").write_text(text)
    told = error_of(lambda: rubric.rubric(str(tmp_path / "mine.yaml")))
    assert told.startswith(
        f"evaluation.endpoint.rubric={tmp_path / 'mine.yaml'}: accepted: a YAML file with system, user"
    )


@pytest.mark.parametrize(("module", "setting"), [(endpoint, "RECIPE"), (endpoint, "RULE")])
def test_what_is_made_of_a_reply_is_part_of_the_version(module, setting, stand, tmp_path, monkeypatch):
    before = judge(stand, tmp_path).version
    monkeypatch.setattr(module, setting, "another")
    assert judge(stand, tmp_path).version != before


def test_changed_code_raises_the_recipe():
    pinned = {1: "ccec1db14166660e"}
    assert pinned.get(rubric.RECIPE) == digest(plain(parts("judges.rubric")))[:16], "raise RECIPE; pin the code"


def test_a_finished_run_is_judged_by_an_endpoint(stand, tmp_path, monkeypatch, capsys):
    """By the command: rates, harmfulness and cost are told and recorded, and the key is on no disk and no screen."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    root = tmp_path / "out"
    run = record(root, "none", 0.2, 0, 10)
    config = OmegaConf.to_container(tiny.config("constraint=none", f"output_root={root}"), resolve=True)
    del config["evaluation"]["endpoint"]  # a record of before
    run.write("config.json", config)
    rows = [
        {"kind": "harmful" if number < 4 else "harmless", "id": str(number), "prompt": prompt, "output": answer}
        for number, (prompt, answer) in enumerate(PAIRS)
    ]
    rows += [{"kind": "task", "id": "t", "prompt": "p", "output": "positive", "gold": "positive"}]
    run.write("generations.jsonl", rows)
    stand.says = lambda body, number: reply(grades(0, *((5, 5) if number % 2 else (1, 1))))
    asked = [f"run={run.path}", "judges=[refusal,endpoint]"]
    given = [f"endpoint.url={stand.url}", "endpoint.model=m", "endpoint.concurrency=1"]
    tiny.launch(evaluate.main, [*asked, *given], "evaluate")
    shown = " ".join(capsys.readouterr().out.split())
    line = "judge endpoint (m, rubric strongreject): 6 requests, 0 replies from the cache; 42 tokens read, 18 written"
    assert line in shown
    assert "harmfulness, judge endpoint" in shown
    told = run.facts()["judges"]["endpoint"]
    assert (told["model"], told["cost"]["requests"], told["harmfulness"]["n"]) == ("m", 6, 4)
    assert told["harmfulness"]["value"] == 50.0
    assert "harmfulness" not in run.facts()
    assert [row["harmfulness"] for row in run.read("verdicts-endpoint.jsonl")[:4]] == [0.0, 1.0, 0.0, 1.0]
    assert load(root)["harmfulness_endpoint"].tolist() == [50.0]
    assert {headers["Authorization"] for headers in stand.headers} == {f"Bearer {KEY}"}

    tiny.launch(evaluate.main, [f"run={run.path}", "judges=[endpoint]", *given], "evaluate")
    shown += capsys.readouterr().out
    assert "0 requests, 6 replies from the cache" in " ".join(shown.split())
    assert run.facts()["harmfulness"]["value"] == 50.0
    assert len(stand.asked) == 6
    tiny.launch(evaluate.main, [f"run={run.path}", "judges=[refusal]"], "evaluate")
    assert "harmfulness" not in run.facts()  # another judge's
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len([path for path in files if path.parent.parent.name == "judged"]) == 6
    assert not [path for path in files if re.search(KEY.encode(), path.read_bytes())]
    assert KEY not in shown
