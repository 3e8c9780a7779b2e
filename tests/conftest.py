"""Shared fixtures."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Set torch up where tests run; the process that only hands them out does without its import."""
    if hasattr(session.config, "workerinput") or not session.config.getoption("numprocesses", None):
        import torch

        torch.set_num_threads(1)  # the models are tiny: threads only wait for each other


@pytest.fixture(scope="module", autouse=True)
def _imports_are_no_garbage() -> None:
    """A search for garbage after every run takes half a second where it goes through all that is imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from support import tiny

    return tiny.save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this call of pytest, the same for all its workers."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session", autouse=True)
def _head_of_the_classifier(shared_folder: Path) -> None:
    """The judge that embeds what it learns from does so in one worker, not in each."""
    from support import shared

    shared.head(shared_folder)
