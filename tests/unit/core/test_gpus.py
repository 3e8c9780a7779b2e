"""Runs on one machine with several GPUs, which are made up here: only their choice is tested."""

from types import SimpleNamespace

import pytest
import torch

from cwac_lab.core.gpus import one_of_several

CUDA = torch.device("cuda")


@pytest.fixture
def chosen(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"gpu-{index}"))
    monkeypatch.setattr(torch.cuda, "set_device", seen.append)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    return seen


def test_runs_at_once_take_different_gpus_and_give_them_back(chosen):
    with one_of_several(CUDA):
        with one_of_several(CUDA):
            assert chosen == [0, 1]
        with one_of_several(CUDA):
            assert chosen == [0, 1, 1]
    with one_of_several(CUDA):
        assert chosen[-1] == 0


def test_more_runs_than_gpus_share_them(chosen):
    with one_of_several(CUDA), one_of_several(CUDA), one_of_several(CUDA), one_of_several(CUDA):
        assert sorted(chosen[:2]) == sorted(chosen[2:]) == [0, 1]


def test_a_gpu_is_given_back_after_an_error(chosen):
    with pytest.raises(ZeroDivisionError), one_of_several(CUDA):
        raise ZeroDivisionError
    with one_of_several(CUDA):
        assert chosen == [0, 0]


def test_the_cpu_takes_none(chosen):
    with one_of_several(torch.device("cpu")):
        assert chosen == []
