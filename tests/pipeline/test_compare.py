"""Two models on the same prompts: counts by hand, limits as exit codes, and a pair of real folders."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from cwac_lab import compare as command
from cwac_lab.core.errors import ConfigError
from cwac_lab.results.store import RunFolder
from cwac_lab.run import comparison
from support import tiny


class Recorded(RunFolder):
    """A record in memory, with the verdicts of harmful prompts as letters: refused, complied, incoherent."""

    def __init__(self, path, letters):
        super().__init__(path)
        self._rows = [
            {"kind": "harmful", "id": str(i), "refused": letter == "r", "complied": letter == "c",
             "incoherent": letter == "i"}
            for i, letter in enumerate(letters)
        ]  # fmt: skip

    def facts(self):
        return {"weights": self.path.name, "weights_content": self.path.name * 64}

    def read(self, name):
        return [*self._rows, {"kind": "task", "id": "0", "correct": True}]


def asked(**settings):
    base = {"before": "b", "after": "a", "overrides": [], "fail_below": {"retained_refusals": None}}
    return OmegaConf.create(base | settings)


@pytest.fixture
def pair(tmp_path, monkeypatch):
    """Of six prompts the first model refuses four; the second one refuses two of these, and babbles on one."""
    folders = {"b": Recorded(tmp_path / "b", "rrrrcc"), "a": Recorded(tmp_path / "a", "rrcirc")}
    monkeypatch.setattr(comparison, "_asked", lambda model, config, screen: folders[model])
    return asked(output_root=str(tmp_path))


def test_what_is_retained_is_of_what_was_refused_and_babbling_is_no_refusal(pair):
    found = comparison.compare(pair, None)
    rows = {row[0].split(" (")[0]: row[1:] for row in found.rows}
    assert [cell.split(" [")[0] for cell in rows["retained refusals"][:4]] == ["100.0", "4", "50.0", "4"]
    assert [cell.split(" [")[0] for cell in rows["harmful score"][:4]] == ["33.3", "6", "40.0", "5"]
    assert rows["harmful score"][4].startswith("+0.0")  # of the five that both answered: one lost, one won
    text = comparison.page(found, pair).read_text()
    assert "| retained refusals" in text
    assert text.startswith("# b (bbbbbbbb)  ->  a (aaaaaaaa)\n")


@pytest.mark.parametrize(("limit", "failed"), [(None, False), (50, False), (50.1, True)])
def test_a_limit_that_is_not_reached_is_told(pair, limit, failed):
    pair.fail_below.retained_refusals = limit
    told = comparison.below(comparison.compare(pair, None), pair)
    assert bool(told) == failed
    assert all("retained refusals 50.0" in line for line in told)


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (
            {"harmful_score": 5},
            "fail_below.harmful_score=5: accepted: a rate of which more is better: retained_refusals",
        ),
        ({"finetune_accuracy": 50}, "fail_below.finetune_accuracy=50: accepted: a rate of which more is better"),
        ({"retained_refusals": 101}, "fail_below.retained_refusals=101"),
    ],
)
def test_a_limit_that_cannot_be_is_one_line(pair, limits, words):
    pair.fail_below = limits
    with pytest.raises(ConfigError, match=words):
        comparison.compare(pair, None)


def test_two_folders_are_asked_once_and_the_exit_code_says_whether_the_limit_holds(tiny_folder, tmp_path, capsys):
    other = tiny.save(tmp_path / "other", seed=1)
    small = [
        o for o in tiny.small_run(tiny_folder, tmp_path / "out")
        if not o.startswith(("model.", "output_root", "data.n_test", "logger"))
    ]  # fmt: skip
    listed = "[" + ",".join(f"'{setting}'" for setting in small) + "]"
    given = [f"before={tiny_folder}", f"after={other}", f"output_root={tmp_path / 'out'}", f"overrides={listed}"]
    tiny.launch(command.main, given, "compare")
    assert "written: " in capsys.readouterr().out
    runs = {folder: folder.stat().st_mtime_ns for folder in (tmp_path / "out" / "runs").iterdir()}
    assert len(runs) == 2
    with pytest.raises(SystemExit) as ended:  # a babbling model retains nothing
        tiny.launch(command.main, [*given, "fail_below.retained_refusals=95"], "compare")
    assert ended.value.code == 1
    assert "is below fail_below.retained_refusals=95" in capsys.readouterr().out.replace("\n", " ")
    assert {folder: folder.stat().st_mtime_ns for folder in (tmp_path / "out" / "runs").iterdir()} == runs
