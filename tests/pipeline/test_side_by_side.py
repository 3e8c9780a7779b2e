"""How many runs of a sweep go side by side."""

from types import SimpleNamespace

import pytest

from cwac_lab.sweep import experiments


@pytest.mark.parametrize(
    ("profile", "accelerator", "cores", "free", "jobs"),
    [
        ("embedded", False, 2, 24, 2), ("embedded", False, 8, 9, 2), ("embedded", False, 1, 24, 1),
        ("embedded", False, 2, 1, 1), ("embedded", True, 8, 24, 1), ("small", False, 8, 24, 1),
    ],
)  # fmt: skip
def test_as_many_runs_go_side_by_side_as_the_machine_takes(monkeypatch, profile, accelerator, cores, free, jobs):
    monkeypatch.setattr(experiments.torch.accelerator, "is_available", lambda: accelerator)
    monkeypatch.setattr(experiments.os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(experiments.psutil, "virtual_memory", lambda: SimpleNamespace(available=free * 2**30))
    assert experiments.fitting(profile, ["model=qwen", "seed=0", "model.path=null"]) == jobs


@pytest.mark.parametrize(
    "override",
    [
        *("model=qwen_coder", "model=gemma", "model=of_a_user", "model.path=FOLDER"),
        *("experiment=vendor_drift", "experiment=[hard_rate,vendor_drift]", "experiment=of_a_user"),
    ],
)
def test_a_model_that_is_larger_or_unknown_has_the_machine_to_itself(override, monkeypatch):
    monkeypatch.setattr(experiments.torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(experiments.os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(experiments.psutil, "virtual_memory", lambda: SimpleNamespace(available=99 * 2**30))
    assert experiments.fitting("embedded", ["model=smollm", "experiment=hard_rate"]) == 8
    assert experiments.fitting("embedded", ["model=smollm", override]) == 1
