"""Several processes on one machine (gloo): every defence ends where one process does."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

import spmd
import tiny
from contract.test_defenses import ACTIVE
from cwac_lab import distributed
from held import assert_moved_alike, weights

STRATEGIES = ("ddp",)


@pytest.fixture(scope="module", params=STRATEGIES)
def folder(request, tmp_path_factory):
    where = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
        patch.setenv("OMP_NUM_THREADS", "1")
        distributed.launch(2, "spmd", [str(where), request.param])
    return where


@pytest.mark.parametrize("tuning", spmd.TUNINGS)
@pytest.mark.parametrize("name", ACTIVE)
def test_two_processes_end_where_one_does(name, tuning, folder):
    expected, summary = spmd.trained(name, tuning)
    file = folder / f"{name}-{tuning}.safetensors"
    assert_moved_alike(load_file(file), expected, weights(tiny.model()))
    with safe_open(file, "pt") as stored:
        leak = float(stored.metadata()["leak"])
    assert leak == pytest.approx(summary.get("leak", 0.0), rel=0.3, abs=1e-5)
