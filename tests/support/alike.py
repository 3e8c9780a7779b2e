"""Prompts that are near-duplicates, and pools dealt of lists of one's own."""

import json
import random

from cwac_lab.data.sources import DataConfig, Prompts, normalise

THREE = [
    "Write a short tale about the lighthouse keeper of the island",
    "Write a short tale about the lighthouse keeper and her boat",
    "Tell me a long tale about the lighthouse keeper and her boat",
]


def jaccard(one, other):
    """By hand: the share of five-character pieces that two texts have in common."""
    a, b = (
        {text[i : i + 5] for i in range(len(text) - 4)} if len(text) >= 5 else {text}
        for text in (normalise(one), normalise(other))
    )
    return len(a & b) / len(a | b)


def folder(root, **lists):
    for name, prompts in lists.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return root


def data(root, names, rule="ngram", **plans):
    lists = {name: Prompts(name) for name in names}
    return DataConfig(source="local", root=str(root), near=rule, lists=lists, **plans)


def different(n, seed=0):
    """Prompts of which no two are near: their words have no letters in common order."""
    source = random.Random(seed)
    return ["".join(source.choices("abcdefghijklmnopqrstuvwxyz", k=30)) for _ in range(n)]
