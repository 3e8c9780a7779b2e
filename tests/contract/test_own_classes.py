"""A defence, task, judge and attack of a user's own module, with options in a folder of the user's."""

import subprocess
import sys

import pytest

from cwac_lab import train
from cwac_lab.core.cache import read_json, read_jsonl
from cwac_lab.results import load
from support import tiny

MODULE = """
from dataclasses import dataclass

from cwac_lab.data.attacks import AttackConfig
from cwac_lab.data.mixing import TrainRow
from cwac_lab.data.tasks.sst2 import SST2
from cwac_lab.defenses.interface import Defense
from cwac_lab.judges.base import Verdict
from cwac_lab.judges.refusal import RefusalJudge


@dataclass
class Counting(Defense):
    weight: float = 1.0

    def after_optimizer_step(self, step):
        self._steps = step + 1

    def summary(self):
        return {"steps": self._steps, "weight": self.weight}


@dataclass
class Films(SST2):
    pass


@dataclass
class Echo(AttackConfig):
    rows: str = "own"
    text: str = "again"

    def others(self, taken):
        return [TrainRow(f"echo/{i}", f"Say it {i} times.", self.text, True) for i in range(3)]


class Length:
    name = "length"
    version = "1"

    def verdicts(self, asked):
        return [Verdict(float(len(answer) > 1), 0.0, float(not answer)) for _, answer in asked]


class Refusal(RefusalJudge):
    version = "another"


class Nameless:
    version = "1"


not_a_class = 3
"""
OPTIONS = {
    "constraint": "# @package constraint.counting\n_target_: {module}.Counting\nweight: 2.0\n",
    "task": "_target_: {module}.Films\nname: films\nmax_new_tokens: 4\ntrain_split: train\ntest_split: test\n",
    "attack": "_target_: {module}.Echo\nname: echo\ntext: once more\n",
}
CHOSEN = ["constraint=counting", "task=films", "attack=echo"]


@pytest.fixture
def own(tmp_path, monkeypatch, request):
    """A folder with a module of its own name, and options that name its classes; Python stands in it."""
    name = f"mine_{abs(hash(request.node.name)) % 10**8}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    for group, text in OPTIONS.items():
        folder = tmp_path / "options" / group
        folder.mkdir(parents=True)
        file = {"constraint": "counting", "task": "films", "attack": "echo"}[group]
        (folder / f"{file}.yaml").write_text(text.format(module=name))
    monkeypatch.chdir(tmp_path)
    yield name
    sys.modules.pop(name, None)


def test_classes_of_an_own_module_are_trained_under_attacked_with_and_judged_by(own, tiny_folder, tmp_path):
    given = [*tiny.small_run(tiny_folder, tmp_path / "out"), "--config-dir=options", *CHOSEN]
    tiny.launch(train.main, [*given, f"evaluation.judges=[{own}.Length,refusal]", "harmful_ratio=0.5"])
    (folder,) = (tmp_path / "out" / "runs").iterdir()
    record = read_json(folder / "metrics.json")
    assert record["constraint"] == "counting"
    assert record["constraint_summary"]["weight"] == 2.0
    assert (record["task"], list(record["judges"])) == ("films", ["length", "refusal"])
    mixture = read_json(folder / "manifest.json")["mixture"]
    assert sum(row.startswith("echo/") for row in mixture["ids"]) == mixture["harmful"] == 8
    assert {row["judge"] for row in read_jsonl(folder / "verdicts.jsonl") if row["kind"] != "task"} == {"length"}
    (told,) = load(tmp_path / "out").to_dict("records")
    assert (told["judge"], told["constraint.counting.weight"]) == ("length", 2.0)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["constraint=counting", "constraint.counting._target_=nowhere.Class"], "constraint.counting._target_=nowhere"),
        (["constraint=counting", "constraint.counting._target_=MINE.Missing"], "constraint.counting._target_=MINE.M"),
        (["constraint=counting", "constraint.counting._target_=MINE.Films"], "constraint.counting._target_=MINE.Films"),
        (["task=films", "task._target_=MINE.not_a_class"], "task._target_=MINE.not_a_class: accepted: the path"),
        (["attack=echo", "attack._target_=MINE.Films"], "attack._target_=MINE.Films: accepted: the path of a Attack"),
        (["attack=mixed", "attack.rows=own"], "attack.rows=own: accepted: harmful | identity | outliers, or a class"),
        (["evaluation.judges=[MINE.Nobody]"], "evaluation.judges=MINE.Nobody: accepted: the path of a Judge"),
        (["constraint=none", "evaluation.judges=[MINE.Nameless]"],
         "evaluation.judges=MINE.Nameless: accepted: a Judge (this one has no name"),
        (["evaluation.judges=[kind]"], "evaluation.judges=kind: accepted: refusal | classifier"),
        (["constraint=none", "evaluation.judges=[refusal,MINE.Refusal]"],
         "evaluation.judges=['refusal', 'MINE.Refusal']: accepted: judges of different names, not refusal, refusal"),
        (["constraint=counting", "constraint.counting.wieght=1"], "constraint.counting.wieght"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_of_an_own_module_is_one_line(own, overrides, key, capsys, tiny_folder, tmp_path):
    given = [*tiny.small_run(tiny_folder, tmp_path / "out"), "--config-dir=options"]
    line = tiny.error_of(train.main, [*given, *(each.replace("MINE", own) for each in overrides)], capsys)
    assert line.startswith(key.replace("MINE", own)), line
    assert not (tmp_path / "out" / "runs").exists()


def test_an_error_within_an_own_module_is_told(own, tiny_folder, tmp_path, capsys):
    (tmp_path / "broken_here.py").write_text("import no_such_package\n")
    target = "constraint.counting._target_=broken_here.Class"
    given = [*tiny.small_run(tiny_folder, tmp_path / "out"), "--config-dir=options", "constraint=counting", target]
    assert "No module named 'no_such_package'" in tiny.error_of(train.main, given, capsys)


@pytest.mark.exhaustive
def test_from_the_command_line(own, tiny_folder, tmp_path):
    given = [*tiny.small_run(tiny_folder, tmp_path / "out"), "--config-dir", "options", *CHOSEN]
    subprocess.run([sys.executable, "-m", "cwac_lab.train", *given], check=True, cwd=tmp_path)
    assert load(tmp_path / "out")["status"].tolist() == ["ok"]
