"""Near-duplicate prompts: which prompts count as one when they are dealt out to pools.

Two prompts are near if the sets of five consecutive characters (blanks among them) of their normalised texts have a
Jaccard index above 0.6 (shingles of Broder 1997), and by the rule ``embedding`` also if the cosine of their sentence
embeddings is above 0.85. What is near in steps is one group: the connected components of near pairs.

Most of a list may be one group: prompts of one template, which differ in a name or a number. To give all of them to one
pool would leave the others empty, so such prompts are kept apart by equal text only, and this is told.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from cwac_lab.core.errors import one_of
from cwac_lab.data.sources import normalise
from cwac_lab.models.embedding import embed

RULES = ("exact", "ngram", "embedding")
# Length of a shingle in characters, and what a near pair is above.
LENGTH, JACCARD, COSINE = 5, 0.6, 0.85
# Prompts that are compared with all others at once, which bounds the memory.
BLOCK = 256
# A group is a template where it has so many prompts, and more than half, of a list.
TEMPLATE = 10

_vectors: dict[str, Tensor] = {}


def shingles(text: str) -> set[str]:
    """Return all runs of five characters of a text; a shorter text is its own only one."""
    return {text[at : at + LENGTH] for at in range(max(1, len(text) - LENGTH + 1))}


def _by_shingles(texts: Sequence[str], n: int | None = None) -> Iterator[Int[np.ndarray, "2 P"]]:
    """Yield the pairs of (the first n) texts and any with a Jaccard index of shingles above ``JACCARD``, by blocks."""
    from scipy import sparse

    sets = [shingles(text) for text in texts]
    columns: dict[str, int] = {}
    flat = [columns.setdefault(shingle, len(columns)) for each in sets for shingle in each]
    sizes = np.array([len(each) for each in sets])
    shape = (len(sets), len(columns))
    holds = sparse.csr_matrix((np.ones(len(flat), np.int32), flat, np.append(0, sizes.cumsum())), shape)
    for at in range(0, len(sets) if n is None else n, BLOCK):
        shared = (holds[at : at + BLOCK] @ holds.T).tocoo()
        row, union = shared.row + at, sizes[shared.row + at] + sizes[shared.col] - shared.data
        near = shared.data / union > JACCARD
        yield np.stack([row[near], shared.col[near]])


def _by_embeddings(prompts: Sequence[str]) -> Iterator[Int[np.ndarray, "2 P"]]:
    """Yield the pairs of prompts with a cosine of embeddings above ``COSINE``, by blocks of rows."""
    new = [prompt for prompt in prompts if prompt not in _vectors]
    if new:  # the runs of a sweep ask for the same ones again
        _vectors.update(zip(new, embed(new, "data.near=embedding"), strict=True))
    x = torch.stack([_vectors[prompt] for prompt in prompts])
    for at in range(0, len(x), BLOCK):
        near: Bool[Tensor, "B N"] = x[at : at + BLOCK] @ x.T > COSINE
        row, column = near.nonzero(as_tuple=True)
        yield np.stack([row.numpy() + at, column.numpy()])


def groups(prompts: Sequence[str], rule: str) -> dict[str, int]:
    """Return the group of every prompt; those of one group go to one pool.

    Args:
        prompts: All prompts that may be dealt.
        rule: ``exact`` (equal when normalised), ``ngram`` (shingles too) or ``embedding`` (embeddings too).

    Raises:
        ConfigError: If there is no such rule.
        MissingAsset: If the package with the weights of the embeddings is not installed.
    """
    one_of("near", rule, RULES)
    known = tuple(dict.fromkeys(prompts))
    if rule == "exact" or not known:
        numbers: dict[str, int] = {}
        return {prompt: numbers.setdefault(normalise(prompt), len(numbers)) for prompt in known}
    return dict(zip(known, _labels(known, rule), strict=True))


@lru_cache(8)  # the runs of a sweep ask for the same ones again
def _labels(known: tuple[str, ...], rule: str) -> tuple[int, ...]:
    """Return the groups of different prompts, as numbers, by shingles or by embeddings too."""
    from scipy import sparse  # not before it is needed: a configuration is read without
    from scipy.sparse.csgraph import connected_components

    texts = [normalise(prompt) for prompt in known]
    pairs = [*_by_shingles(texts), *(_by_embeddings(known) if rule == "embedding" else ())]
    row, column = np.concatenate(pairs, 1)
    graph = sparse.coo_matrix((np.ones(len(row), bool), (row, column)), (len(known), len(known)))
    _, labels = connected_components(graph, directed=False)
    return tuple(labels.tolist())


def near_to(prompts: Sequence[str], held: Sequence[str], rule: str) -> set[str]:
    """Return the prompts that are equal or near to one that is held, by a rule of ``groups``; no chain of near ones."""
    known, others = list(dict.fromkeys([*prompts, *held])), set(held)
    n, texts = len(set(prompts)), [normalise(prompt) for prompt in known]
    taken = {normalise(prompt) for prompt in held}
    found = {prompt for prompt in prompts if normalise(prompt) in taken}
    if not held or not prompts or rule == "exact":
        return found
    pairs = [*_by_shingles(texts, n), *(_by_embeddings(known) if rule == "embedding" else ())]
    row, column = np.concatenate(pairs, 1)
    return found | {known[a] for a, b in zip(row, column, strict=True) if a < n and known[b] in others}


def templated(lists: Mapping[str, Sequence[str]], group_of: Mapping[str, int]) -> dict[str, set[str]]:
    """Return, by list, the prompts of its template; lists without one are left out.

    Args:
        lists: Prompts by list.
        group_of: What ``groups`` returns for all of them.
    """
    found = {}
    for name, prompts in lists.items():
        counts = Counter(group_of[prompt] for prompt in set(prompts))
        for group, count in counts.most_common(1):
            if count >= TEMPLATE and 2 * count > counts.total():
                found[name] = {prompt for prompt, each in group_of.items() if each == group}
    return found


def told_apart(group_of: Mapping[str, int], prompts: Collection[str]) -> dict[str, int]:
    """Return the groups with some prompts grouped by equal text only."""
    numbers: dict[str, int] = {}
    return {
        prompt: numbers.setdefault(normalise(prompt), -1 - len(numbers)) if prompt in prompts else group
        for prompt, group in group_of.items()
    }
