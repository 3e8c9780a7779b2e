"""Whose answers to the task's rows a judge at an endpoint prefers: those of a run, or those of another one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cwac_lab.config.run import ALIKE, Run
from cwac_lab.core.cache import digest
from cwac_lab.core.errors import ConfigError, MissingAsset
from cwac_lab.evaluation import pairwise
from cwac_lab.judges.endpoint import Endpoint
from cwac_lab.report.console import Screen
from cwac_lab.results import store
from cwac_lab.results.store import RunFolder
from cwac_lab.run import stages
from cwac_lab.run.identity import without


def prefer(run: Run, folder: RunFolder, other: RunFolder, screen: Screen) -> None:
    """Ask a judge at an endpoint, in both orders, which of two runs answers the task's rows better; nothing is made.

    The record gets the win rate under ``win_rates``, by the other run's method.

    Args:
        run: Configuration of the run, with that of the endpoint.
        folder: The run.
        other: Another run on the same rows, mostly the start (``finetune=false``).
        screen: Told the win rate and what it took.

    Raises:
        ConfigError: If the endpoint has no address or model, cannot be reached, or the other run is the same one.
        MissingAsset: If a run is not finished, or its answers are not kept.
        LabError: If the two runs do not answer the same rows.
    """
    judge = Endpoint(run.evaluation.endpoint, Path(run.cache_root))
    if folder.path.resolve() == other.path.resolve():
        raise ConfigError("against", other.path, "another run than run=")
    for key, each in (("run", folder), ("against", other)):
        if not each.done() or not each.has(store.GENERATIONS):
            raise MissingAsset(f"{key}={each.path}: no finished run with {store.GENERATIONS} there")
    ours, theirs = (each.read(store.GENERATIONS) for each in (folder, other))
    pairwise.pairs(ours, theirs)  # whether they fit, before a server is asked
    judge.reach()
    found = pairwise.against(ours, theirs, judge.ask)
    method, setting = method_of(other.facts()), setting_of(other)
    record = folder.read(store.METRICS)
    known = record.get("win_rates", {}).get(method)
    if known is not None and known["setting"] != setting:
        method = f"{method} ({setting})"
    by = f"{judge.settings.model} {digest([pairwise.QUESTION, judge.settings.max_tokens])[:8]}"
    with folder.claim(wait=1.0) as free:
        if not free:
            raise MissingAsset(f"run={folder.path}: in use by another process; ask again")
        record = folder.read(store.METRICS)
        told = {**found.to_dict(), "against": other.path.name, "setting": setting, "judge": by}
        record = {**record, "win_rates": record.get("win_rates", {}) | {method: told}}
        folder.write(store.METRICS, record)
        stages.write_card(run, folder, record)
    if method != "start" and other.facts()["seed"] != record["seed"]:
        screen.say(f"the two have different seeds: {record['seed']} and {other.facts()['seed']}")
    screen.say(f"win rate over {method} ({other.path.name}), judge {by}: {found}")
    cost = judge.cost
    screen.say(f"{cost.requests} requests, {cost.cached} replies from the cache; {cost.tokens_read} tokens read, "
               f"{cost.tokens_written} written")  # fmt: skip


def setting_of(run: RunFolder) -> str:
    """Return a short hash of what a run is but for its seed: start, and all settings that change a result.

    How ``method_of`` calls it is left out.
    """
    facts = run.facts()
    if facts["constraint"] == "start":
        return digest(facts["weights_content"])[:8]
    kept = without(run.config(), (*ALIKE, "seed", "label", "harmful_ratio"))
    return digest([facts["weights_content"], kept])[:8]


def method_of(facts: dict[str, Any]) -> str:
    """Return how a run is called as the other side: its constraint, and the harmful ratio where it was trained."""
    if facts["constraint"] == "start":
        return "start"
    return f"{facts['constraint']} at {facts['harmful_ratio']:g}"
