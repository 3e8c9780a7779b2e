"""The prompts that a start is aligned on: lists of the project's own, the same whatever ``data`` and its seed are.

A plan that names a pool ``alignment`` takes its prompts instead (``pools``).
"""

from __future__ import annotations

from cwac_lab.core.cache import digest
from cwac_lab.data.responses import REFUSALS
from cwac_lab.data.sources import PromptRow, embedded_prompts

POOL = "alignment"
# Resources of ``data/embedded/alignment`` by kind.
LISTS = {"harmful": ("requests",), "harmless": ("instructions", "chat"), "lookalike": ("lookalikes",)}


def taught() -> dict[str, list[PromptRow]]:
    """Return the prompts by kind, in the order of the lists."""
    return {
        kind: [row for name in names for row in embedded_prompts(f"{POOL}/{name}")] for kind, names in LISTS.items()
    }


def digests() -> dict[str, str]:
    """Return the SHA-256 of each list, and of the refusals."""
    lists = {
        name: digest([row.prompt for row in embedded_prompts(f"{POOL}/{name}")])
        for names in LISTS.values()
        for name in names
    }
    return {**lists, "refusals": digest(REFUSALS)}
