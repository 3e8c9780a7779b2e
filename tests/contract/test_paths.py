"""Paths with signs of their own: read as they are meant, or one line with a hint how to quote them."""

import os
import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from cwac_lab import diagnose, tables, train
from cwac_lab.core import cli, overrides
from cwac_lab.core.errors import LabError
from cwac_lab.results.store import runs
from support import tiny
from support.cover import some

HOME = os.path.expanduser("~")
# An argument as a shell hands it over: what it sets its key to, or how its line goes on.
READ = {
    "model.path=~/m": f"{HOME}/m",
    "model.path='~/m'": f"{HOME}/m",
    'model.path="~/m"': f"{HOME}/m",
    "model.path=~": HOME,
    "++model.path=~/a=b": f"{HOME}/a=b",
    "model.path='a/~/m'": "a/~/m",
    "model.path=2024_10_01": "2024_10_01",
    "model.path=1e3": "1e3",
    "model.path=true": "true",
    "model.path=007": "007",
    "model.path=null": None,
    "model.path='it\\'s'": "it's",
    "model.path='模型/a=b,c [x] {y} #1 ~'": "模型/a=b,c [x] {y} #1 ~",
    "model.path='модель'": "модель",
    "model.path='النموذج'": "النموذج",
}
HINTS = {
    "model.path=runs/a=b": "\"model.path='runs/a=b'\"",
    "model.path=模型/m": "\"model.path='模型/m'\"",
    "model.path=модель": "\"model.path='модель'\"",
    "model.path=é/m": "\"model.path='é/m'\"",
    "model.path=a~b": "\"model.path='a~b'\"",
    "model.path=a/~/m": "\"model.path='a/~/m'\"",
    "model.path=x[1]/m": "\"model.path='x[1]/m'\"",
    "model.path=m (1)": "\"model.path='m (1)'\"",
    "model.path=a{b}": "\"model.path='a{b}'\"",
    "model.path=a#b": "\"model.path='a#b'\"",
    "model.path=a&b;c^d": "\"model.path='a&b;c^d'\"",
    "model.path=it's": "\"model.path='it\\'s'\"",
    "model.path='half": "\"model.path='half'\"",
    "model.path=a$b#!": "'model.path=\"a$b#!\"'",
    "data.root=d=1": "\"data.root='d=1'\"",
    "output_root=o=1": "\"output_root='o=1'\"",
    "cache_root=c=1": "\"cache_root='c=1'\"",
    "label=weight=0.5": "\"label='weight=0.5'\"",
    "++model.path=a=b": "\"++model.path='a=b'\"",
    "model.path=a,b": "\"model.path='a,b'\"",
}
OTHERS = {
    "foo": "foo: accepted: KEY=VALUE with a key of the configuration",
    "模型=3": "模型=3: accepted: KEY=VALUE with a key of the configuration",
    "evaluation.judges=[refusal,\nphrases]": "evaluation.judges=[refusal,\\nphrases]: Hydra cannot read it (a line",
    "evaluation.judges=[refusal": "evaluation.judges=[refusal: Hydra cannot read it (no viable alternative",
}


@pytest.mark.parametrize("argument", READ)
def test_a_path_is_read_as_it_is_meant(argument):
    assert cli.compose([argument]).model.path == READ[argument]


@pytest.mark.parametrize("argument", some(READ, "model.path=~/m", "model.path='it\\'s'"))
def test_the_command_line_reads_a_path_as_it_is_meant(argument):
    seen = []
    tiny.launch(lambda config: seen.append(config.model.path), [argument])
    assert seen == [READ[argument]]


@pytest.mark.parametrize("argument", HINTS)
def test_what_hydra_cannot_read_is_named_with_a_hint(argument, capsys):
    """And the hint, given as it stands to a shell, sets the key to what was meant."""
    line = tiny.error_of(lambda _: pytest.fail("it ran"), [argument], capsys)
    assert line.startswith(f"{argument}: ")
    assert HINTS[argument] in line
    (typed,) = shlex.split(HINTS[argument])
    value = argument.partition("=")[2]
    assert OverridesParser.create().parse_override(typed).value() == value.lstrip("'")
    if "," not in value:
        with pytest.raises(LabError, match="is quoted twice"):
            cli.compose([argument])


@pytest.mark.parametrize("argument", OTHERS)
def test_other_arguments_that_cannot_be_read_are_named(argument, capsys):
    assert tiny.error_of(lambda _: pytest.fail("it ran"), [argument], capsys).startswith(OTHERS[argument])


@pytest.mark.parametrize(
    "value", ["plain/a-b_c.d", "a b", "模型", "a=b", "2024_10_01", "it's", 'say "so"', "~x", "a,b"]
)
def test_a_text_comes_through_as_an_argument(value):
    assert OverridesParser.create().parse_override(overrides.text("run", value)).value() == value


STRANGE = "模型 mod=el,1 [x] {y} it's #~"


@pytest.mark.slow
def test_paths_of_any_signs_work_throughout(tmp_path, capsys):
    """One run, a sweep, drift of the run and of two folders, tables of an experiment; all in a strange place."""
    place = tmp_path / STRANGE
    place.mkdir()
    folder = tiny.save(place / "m")
    settings = [s for s in tiny.small_run(folder, place) if not s.startswith(("model.path", "output_root"))]
    where = [overrides.text("model.path", folder), overrides.text("output_root", place / "out")]
    tiny.launch(train.main, [*settings, *where, "constraint=weight"])
    tiny.launch(train.main, ["-m", *settings, *where, "constraint=none", "seed=0,1"])
    found = list(runs(place / "out"))
    assert [run.status for run in found] == ["ok"] * 3
    tiny.launch(diagnose.main, [overrides.text("run", found[-1].path), "measured_in=weight", "n_prompts=4"], "diagnose")
    both = [overrides.text("before", folder), overrides.text("after", found[-1].path / "model")]
    tiny.launch(diagnose.main, [*both, "measured_in=none", "n_prompts=4"], "diagnose")
    tiny.launch(tables.main, [overrides.text("output_root", place / "out")], "tables")
    assert (place / "out" / "tables" / "summary.csv").is_file()
    assert {path.name for path in place.iterdir()} == {"m", "out"}  # nothing went elsewhere


def test_a_home_folder_of_nobody_is_told(capsys):
    line = tiny.error_of(lambda _: pytest.fail("it ran"), ["output_root=~nobody_of_this_name/x"], capsys)
    assert line.startswith("output_root=~nobody_of_this_name/x: Hydra cannot read it (the sign ~)")


def test_a_home_folder_is_expanded_before_hydra_makes_folders(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    settings = [s for s in tiny.small_run(tiny_folder, tmp_path) if not s.startswith("output_root")]
    tiny.launch(train.main, ["-m", *settings, "output_root=~/out", "constraint=none", "seed=0,1"])
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert (tmp_path / "out" / "sweeps").is_dir()
