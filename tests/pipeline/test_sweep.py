"""Grids of tiny runs: what is missing is made, what is recorded is left alone, what fails is told."""

import json
import os
import sys
from pathlib import Path

import pytest
import yaml

from cwac_lab import results, tables, train
from cwac_lab.core.errors import ConfigError, MissingAsset
from cwac_lab.evaluation.objectives import tuning_error
from cwac_lab.report.console import Screen
from cwac_lab.results.store import RunFolder
from cwac_lab.run import identity
from cwac_lab.sweep import cells, grid, runner
from support import tiny
from support.cover import some

ROOT = Path(__file__).parents[2]
GRIDS = sorted(grid.find(ROOT / "experiments" / "grids", None))
SMALL = {"title": "two methods", "start": True, "fixed": {"task": "sst2", "harmful_ratio": 0.2},
         "cells": [{"constraint": ["none", "l2"]}]}  # fmt: skip


def write(root, name, content):
    root.mkdir(parents=True, exist_ok=True)
    (root / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))


def launch(tiny_folder, root, output, *more):
    settings = [o for o in tiny.small_run(tiny_folder, output) if not o.startswith("output_root")]
    listed = "[" + ",".join(f"'{setting}'" for setting in settings) + "]"
    tiny.launch(
        tables.main, [f"experiments_root={root}", f"output_root={output}", f"overrides={listed}", *more], "tables"
    )


def test_the_cells_of_a_grid(tmp_path):
    content = {**SMALL, "profiles": {"paper": {"task": "gsm8k"}}, "cells": [
        {"constraint": ["none", "[weight,lisa]"], "harmful_ratio": [0, 0.1]}, {"constraint": "none", "finetune": True},
    ]}  # fmt: skip
    write(tmp_path, "mine", content)
    found = grid.read(tmp_path / "mine.yaml", "embedded")
    assert len(found.cells) == 5
    assert found.cells[2] == ("profile=embedded", "task=sst2", "constraint=[weight,lisa]", "harmful_ratio=0")
    assert found.cells[4] == ("profile=embedded", "task=sst2", "harmful_ratio=0.2", "constraint=none", "finetune=true")
    runs = found.runs(2)
    assert len(runs) == len(set(runs)) == 1 + 10
    assert runs[0] == ("profile=embedded", "task=sst2", "finetune=false")
    assert "task=gsm8k" in grid.read(tmp_path / "mine.yaml", "paper").cells[0]


def test_blocks_of_a_grid_may_be_empty_and_values_are_read_as_yaml_has_them(tmp_path):
    (tmp_path / "mine.yaml").write_text("fixed:\nprofiles:\n  embedded:\ncells: [{x: [[null, true, 1]], y: {a: no}}]\n")
    assert grid.read(tmp_path / "mine.yaml", "embedded").cells == (
        ("profile=embedded", "x=[null,true,1]", "y={a:false}"),
    )


def test_the_cells_of_a_profile_replace_the_others(tmp_path):
    write(tmp_path, "mine", {**SMALL, "profiles": {"small": {"task": "gsm8k", "cells": [{"constraint": "kl"}]}}})
    cells = {profile: grid.read(tmp_path / "mine.yaml", profile).cells for profile in ("small", "paper")}
    assert cells["small"] == (("profile=small", "task=gsm8k", "harmful_ratio=0.2", "constraint=kl"),)
    assert len(cells["paper"]) == 2


@pytest.mark.parametrize("profile", some(("embedded", "small", "paper"), "embedded"))
@pytest.mark.parametrize("file", some(GRIDS, *GRIDS[:3], others="slow"), ids=lambda file: file.stem)
def test_every_grid_of_the_project_composes(file, profile):
    """Each value of each key, and each constraint with each model."""
    seen = set()
    for overrides in grid.read(file, profile).runs(1):
        named = tuple(o for o in overrides if o.partition("=")[0] in ("model", "constraint", "finetune"))
        if not seen.issuperset({named, *overrides}):
            seen.update({named, *overrides})
            runner.composed((*overrides, "trainer.accelerator=cpu"))


@pytest.mark.slow
def test_a_start_is_asked_as_each_attack_of_the_grid_asks():
    """And once for the attacks that differ in what is trained on only."""

    def asked(overrides):
        attack = runner.composed((*overrides, "trainer.accelerator=cpu")).attack
        return attack.prefix, attack.prefill, attack.template

    runs = grid.read(ROOT / "experiments" / "grids" / "attacks.yaml", "embedded").runs(1)
    starts = [asked(overrides) for overrides in runs if "finetune=false" in overrides]
    trained = {o: overrides for overrides in runs for o in overrides if o.startswith("attack=")}
    assert len(starts) == len(set(starts)) == 4
    assert set(starts) == {asked(overrides) for overrides in trained.values()}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"cell": []}, "mine.yaml: cell=.*accepted: one of the keys title, "),
        ({"title": "x"}, "mine.yaml: cells=None: accepted: a list of blocks"),
        ({"cells": ["none"]}, r"mine.yaml: cells\[0\]=none: accepted: a mapping"),
        ("", "mine.yaml: cells=None: accepted: a list of blocks"),
        ("cells: [", r"mine.yaml=while parsing .*: accepted: a YAML file"),
        ("[title]", r"mine.yaml=\['title'\]: accepted: a mapping"),
        ({"cells": [{"x": 1}], "fixed": 3}, "mine.yaml: fixed=3: accepted: a mapping"),
        ({"cells": [{"x": 1}], "profiles": {"embedded": "y"}}, "mine.yaml: profiles.embedded=y: accepted: a mapping"),
        ({"cells": [{"seed": 3}]}, r"mine.yaml: cells\[0\].seed=3: accepted: no seed in a grid"),
    ],
)
def test_a_grid_that_cannot_be_read(content, message, tmp_path):
    if isinstance(content, str):
        (tmp_path / "mine.yaml").write_text(content)
    else:
        write(tmp_path, "mine", content)
    with pytest.raises(ConfigError, match=message):
        grid.read(tmp_path / "mine.yaml", "embedded")
    with pytest.raises(MissingAsset, match=r"exp=other: no other.yaml .* accepted: mine"):
        grid.read(tmp_path / "other.yaml", "embedded")


@pytest.mark.slow
@pytest.mark.parametrize("jobs", some([1, 2], 2))
def test_missing_runs_are_made_once(jobs, tiny_folder, tmp_path, capsys):
    write(tmp_path / "exp", "mine", SMALL)
    launch(tiny_folder, tmp_path / "exp", tmp_path / "out", "exp=mine", f"jobs={jobs}", "seeds=2")
    first = capsys.readouterr().out
    assert "5 runs, 0 recorded already" in first
    assert "[5/5] ok" in first
    frame = results.load(tmp_path / "out")
    assert sorted(frame["constraint"]) == ["l2", "l2", "none", "none", "start"]
    table = (tmp_path / "out" / "tables" / "mine.md").read_text()
    assert table.count("| l2 |") == 2  # rates, and differences
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "runs").glob("*/metrics.json")}
    launch(tiny_folder, tmp_path / "exp", tmp_path / "out", "exp=all", "seeds=2")
    assert "5 runs, 5 recorded already" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert (tmp_path / "out" / "tables" / "mine.md").read_text() == table
    launch(tiny_folder, tmp_path / "exp", tmp_path / "out", "exp=mine", "seeds=2", "columns=[finetune_accuracy]")
    assert (
        "| harmful_ratio | constraint | seeds | FA ↑ | n | broken |\n" in (tmp_path / "out/tables/mine.md").read_text()
    )


@pytest.mark.slow
def test_finished_runs_of_a_grid_that_asks_more_are_measured_again(tiny_folder, tmp_path, capsys):
    def table(cells=SMALL["cells"], **more):
        fixed = {**SMALL["fixed"], "trainer.export": True, **more}
        write(tmp_path / "exp", "mine", {**SMALL, "cells": cells, "fixed": fixed})
        launch(tiny_folder, tmp_path / "exp", tmp_path / "out", "exp=mine", "seeds=1")
        runs = sorted((tmp_path / "out" / "runs").iterdir())
        return capsys.readouterr().out, {run: json.loads((run / "metrics.json").read_text()) for run in runs}

    _, before = table()
    assert not any("perplexity" in record for record in before.values())
    asked = {"evaluation.perplexity": True}
    told, after = table(**asked)
    assert "3 runs, 0 recorded already, 3 asked for more" in told
    assert "fine-tuning on" not in told
    assert all({**after[run], **before[run]} == after[run] and after[run]["perplexity"] for run in before)
    assert "3 runs, 3 recorded already\n" in table(**asked)[0]
    cell = {"constraint": "none", "trainer.learning_rate": 0.002}  # two cells of one run, not there yet
    _, both = table([cell, cell | asked])
    assert [record["perplexity"] is not None for run, record in both.items() if run not in before] == [True]


@pytest.mark.slow
def test_the_runs_of_all_grids_are_one_sweep_and_each_table_comes_as_its_runs_are_there(tiny_folder, tmp_path, capsys):
    alike = [{"constraint": "none", "harmful_ratio": ratio} for ratio in (0.2, "2.0e-1")]  # two cells, one run
    write(tmp_path / "exp", "a", {"title": "a", "fixed": {"task": "sst2"}, "cells": alike})
    write(tmp_path / "exp", "b", {**SMALL, "start": False})
    launch(tiny_folder, tmp_path / "exp", tmp_path / "out", "exp=all", "jobs=1")
    told = capsys.readouterr().out
    assert "2 runs, 0 recorded already" in told
    assert (
        told.index("[1/2] ok")
        < told.index("| 0.2 | none | 1 |")
        < told.index("[2/2] ok")
        < told.index("| 0.2 | l2 | 1 |")
    )
    assert (tmp_path / "out" / "tables" / "a.md").read_text().count("| 0.2 | none |") == 1


@pytest.mark.exhaustive
def test_recorded_cells_are_looked_up_and_tables_of_the_same_records_left_alone(tiny_folder, tmp_path, monkeypatch):
    write(tmp_path / "exp", "mine", {**SMALL, "cells": [{"constraint": "l2", "constraint.l2.strength": [1, 2]}]})
    launch(tiny_folder, tmp_path / "exp", tmp_path / "out", "exp=mine", "seeds=2")
    composed, asked = runner.composed, []
    monkeypatch.setattr(runner, "composed", lambda overrides: asked.append(overrides) or composed(overrides))
    made = [file for kind in ("tables", "figures") for file in (tmp_path / "out" / kind).iterdir()]
    table = tmp_path / "out" / "tables" / "mine.md"

    def again(*more):
        identity._known.clear()  # as in a new process
        asked.clear()
        launch(tiny_folder, tmp_path / "exp", tmp_path / "out", "exp=mine", "seeds=2", *more)
        return len(asked), {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in made}

    one, first = again()
    assert one == 1  # the first, to see whether weights and data are still the same
    made[0].unlink()
    _, second = again()
    assert {file for file in made if second[file] != first[file]} == set(made)  # written again, all of them
    assert all(second[file][1] == first[file][1] for file in made)
    stamp, outside = tmp_path / "out" / "made" / "mine.json", tmp_path / "other.svg"
    outside.write_text("")
    stamp.write_text(json.dumps(json.loads(stamp.read_text()) | {"of": "others", "files": [str(outside)]}))
    _, second = again()
    assert outside.exists()  # whatever a stamp names, only figures of this store are ever removed
    (tmp_path / "out" / cells.FILE).write_text("{")
    assert again() == (5, second)
    entries = json.loads((tmp_path / "out" / cells.FILE).read_text())
    stale = {key: entry | {"content": {"weights_content": "others"}} for key, entry in entries.items()}
    (tmp_path / "out" / cells.FILE).write_text(json.dumps(stale))
    assert again() == (5, second)
    record, _ = sorted((tmp_path / "out" / "runs").glob("*-l2-*-s0-*"))
    for name, text in {"verdicts.jsonl": "", "config.json": "{"}.items():
        whole = (record / name).read_text()
        (record / name).write_text(text)
        assert again()[1][table][1] != second[table][1]  # one run less
        (record / name).write_text(whole)
        assert again()[1][table][1] == second[table][1]


def test_a_failing_cell_stops_no_other(tiny_folder, tmp_path, capsys):
    write(tmp_path / "exp", "mine", {**SMALL, "cells": [{"constraint": ["magic", "none"]}, {"harmful_ratio": 7}]})
    with pytest.raises(SystemExit) as stopped:
        launch(tiny_folder, tmp_path / "exp", tmp_path / "out", "exp=mine", "jobs=1")
    assert stopped.value.code == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "constraint=magic" in out
    assert "harmful_ratio=7: accepted: a number in [0, 1]" in out
    assert set(results.load(tmp_path / "out")["status"]) == {"ok"}


@pytest.mark.slow
def test_a_run_that_kills_its_process_takes_no_other_with_it(monkeypatch):
    work = [("fine", str(i)) for i in range(4)] + [("kill",)] + [("fine", str(i)) for i in range(4, 9)]
    monkeypatch.setattr(runner, "_work", perhaps_die)
    found = list(runner.outcomes(work, 2, Screen(quiet=True)))
    assert {outcome.overrides for outcome in found} == set(work)
    assert len(found) == len(work)
    assert [outcome.overrides for outcome in found if outcome.status == "failed"] == [("kill",)]


@pytest.mark.parametrize(("accelerated", "way"), [(False, "forkserver"), (True, "spawn")])
def test_workers_are_not_forked_where_a_gpu_may_have_been_asked_for(accelerated, way, monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: accelerated)
    monkeypatch.setattr(sys, "platform", "linux")
    assert runner._fresh().get_start_method() == way


@pytest.mark.slow
def test_workers_see_the_environment_of_now(monkeypatch):
    monkeypatch.setattr(runner, "_work", tell)
    for value in ("a", "b"):
        monkeypatch.setenv("CWAC_LAB_TOLD", value)
        (found,) = runner._pooled([("CWAC_LAB_TOLD",)], 1)
        assert found.reason == value


def tell(overrides):
    return runner.Outcome(overrides, "ok", os.environ[overrides[0]])


def perhaps_die(overrides):
    if overrides == ("kill",):
        os._exit(9)
    return runner.Outcome(overrides, "ok")


def tune(tiny_folder, output, *more):
    trials = ["-m", "search=l2", "hydra.sweeper.n_trials=2"]
    tiny.launch(train.main, [*trials, *tiny.small_run(tiny_folder, output), *more])


@pytest.mark.slow
def test_tuning_takes_the_best_trial_of_the_validation_split(tiny_folder, tmp_path, capsys):
    tune(tiny_folder, tmp_path)
    (told,) = tmp_path.glob("sweeps/*/optimization_results.yaml")
    best = yaml.safe_load(told.read_text())
    errors = {
        json.loads((folder / "config.json").read_text())["constraint"]["l2"]["strength"]:
            tuning_error(json.loads((folder / "metrics.json").read_text()))
        for folder in (tmp_path / "runs").iterdir()
    }  # fmt: skip
    assert len(errors) == 2
    assert best["best_value"] == min(errors.values()) == errors[best["best_params"]["constraint.l2.strength"]]


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["evaluation.split=test"], "evaluation.split=test: accepted: validation"),
        (["hydra.sweeper.n_trials=0"], "hydra.sweeper.n_trials: no trial was made (accepted: a budget of 1 or more)"),
        (["objective=harm"], "hydra.sweeper.direction=minimize: accepted: maximize with objective=harm"),
        (["dry=true"], "dry=True: accepted: false in a search; true with the settings of one trial, without search="),
        (
            ["objective=harm", "hydra.sweeper.direction=maximize"],
            "evaluation.perplexity=False: accepted: true with objective=harm",
        ),
        (["objective=fun"], "objective=fun: accepted: errors | harm"),
    ],
)
def test_a_search_that_cannot_be_is_one_line(more, line, tiny_folder, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        tune(tiny_folder, tmp_path, *more)
    assert line in capsys.readouterr().err


@pytest.mark.slow
def test_a_trial_that_another_process_is_on_is_told_in_one_line(tiny_folder, tmp_path, capsys):
    one = ["hydra.sweeper.params={constraint.l2.strength:'choice(2.0)'}", "hydra.sweeper.n_trials=1"]
    tune(tiny_folder, tmp_path, *one)
    (folder,) = (tmp_path / "runs").iterdir()
    (folder / "status.json").unlink()
    with RunFolder(folder).claim() as mine:
        assert mine
        with pytest.raises(SystemExit, match="2"):
            tune(tiny_folder, tmp_path, *one)
    told = capsys.readouterr().err
    assert "another process is on this trial; search again when it is finished" in told
    assert "Traceback" not in told


@pytest.mark.slow
def test_an_attacker_is_told_of_harm_and_goes_on_where_it_stopped(tiny_folder, tmp_path, capsys):
    """Tiny models are broken; what a broken one has is the least. Trials that are recorded are not made again."""
    attack = ["-m", "search=attacker", *tiny.small_run(tiny_folder, tmp_path), "constraint=none"]
    attack += ["hydra.sweeper.params={trainer.learning_rate:'tag(log,interval(1e-4,1e-3))',tuning:'choice(full,lora)'}"]
    tiny.launch(train.main, [*attack, "hydra.sweeper.n_trials=1"])
    (first,) = (tmp_path / "runs").iterdir()
    made = (first / "metrics.json").stat().st_mtime_ns
    tiny.launch(train.main, [*attack, "hydra.sweeper.n_trials=2"])
    assert len(list((tmp_path / "runs").iterdir())) == 2
    assert (first / "metrics.json").stat().st_mtime_ns == made
    best = [
        yaml.safe_load(file.read_text())["best_value"] for file in tmp_path.glob("sweeps/*/optimization_results.yaml")
    ]
    assert best == [-100.0, -100.0]


@pytest.mark.slow
def test_trouble_after_a_users_error_is_not_hidden(tmp_path):
    def one_of_two(config):
        raise ConfigError("seed", 0, "1") if config.seed == 0 else ValueError("a fault of ours")

    with pytest.raises(ValueError, match="a fault of ours"):
        tiny.launch(one_of_two, ["-m", "seed=0,1", f"output_root={tmp_path}"])
