"""Sweeps whose runs a launcher starts in processes of their own."""

import subprocess
import sys
from importlib.util import find_spec

import pytest

from cwac_lab import train
from cwac_lab.results import load
from support import tiny

LAUNCHERS = {
    "joblib": ["hydra.launcher.n_jobs=2"],
    "submitit_local": ["hydra.launcher.timeout_min=10"],
    "ray": ["+hydra.launcher.ray.init.num_cpus=2", "+hydra.launcher.ray.init.include_dashboard=false"],
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_runs_of_a_launcher_are_recorded_and_a_failure_shows_in_the_exit_code(launcher, tmp_path):
    if launcher == "ray" and find_spec("hydra_plugins.hydra_ray_launcher") is None:
        pytest.skip("needs pip install 'cwac-lab[ray]'")
    model = tiny.save(tmp_path / "model")
    seeds = "-1,0,1" if launcher == "joblib" else "-1,0"
    chosen = [
        "constraint=none",
        f"hydra/launcher={launcher}",
        *LAUNCHERS[launcher],
        f"seed={seeds}",
    ]
    command = [sys.executable, "-m", "cwac_lab.train", "-m", *tiny.small_run(model, tmp_path / "out"), *chosen]
    told = tmp_path / "told.txt"
    with told.open("w") as stream:  # not a pipe, which processes that outlive the command would keep open
        done = subprocess.run(command, stdout=stream, stderr=stream)
    found = load(tmp_path / "out")
    assert sorted(found["seed"]) == ([0, 1] if launcher == "joblib" else [0])  # also after the one that fails
    assert set(found["status"]) == {"ok"}
    assert done.returncode == 2
    if launcher != "submitit_local":  # which writes what its jobs print into files
        assert "error: seed=-1: accepted: a number in [0, 9.0072e+15]" in told.read_text()


def test_runs_after_one_that_fails_are_recorded(tiny_folder, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        tiny.launch(train.main, ["-m", *tiny.small_run(tiny_folder, tmp_path), "constraint=none", "seed=-1,0"])
    assert "error: seed=-1: accepted: a number in [0, 9.0072e+15]" in capsys.readouterr().err
    assert load(tmp_path)["seed"].tolist() == [0]


def test_a_launcher_that_is_not_installed_is_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "cwac_lab.train", "-m", "hydra/launcher=slurmish", "seed=0,1"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: hydra/launcher=slurmish: accepted: basic")
    assert "pip install 'cwac-lab[launchers]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1
