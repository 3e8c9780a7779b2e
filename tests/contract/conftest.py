"""A small configuration and its pools, which tests of keys start from."""

from __future__ import annotations

import pytest

from cwac_lab.config.run import read
from cwac_lab.data.pools import build_pools
from support import tiny


@pytest.fixture(scope="module")
def small(tiny_folder, tmp_path_factory):
    some = (*tiny.small_run(tiny_folder, tmp_path_factory.mktemp("out")), "constraint.activation.n_latents=4")
    return lambda *overrides: read(tiny.config(*some, "sae.n_tokens=1000000", *overrides))


@pytest.fixture(scope="module")
def run(small):
    return small()


@pytest.fixture(scope="module")
def pools(run):
    return build_pools(run.data)
