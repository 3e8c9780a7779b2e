"""Which run a configuration comes to: its key of settings, weights and data, and its folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

from cwac_lab.config.run import ALIKE, Run
from cwac_lab.core import distributed
from cwac_lab.core.cache import digest
from cwac_lab.core.classes import located, outside, source
from cwac_lab.data.pools import Pools, build_pools
from cwac_lab.data.responses import compliance, refusal
from cwac_lab.data.sources import TaskData
from cwac_lab.data.tasks.base import TaskRow
from cwac_lab.results.store import SCHEMA, RunFolder
from cwac_lab.run.start import Start, base, start

_TARGET = "_target_"
# Names of content in a key that not every run has.
ATTACK_ROWS, SYSTEM_PROMPT, OWN = "attack_rows_sha256", "system_sha256", "own_sources"


def run_key(resolved: dict[str, Any], content: dict[str, str]) -> str:
    """Return the identity of a run.

    A class counts by its name, so that no run is another one because a file was moved; what a class of a user's own
    does is in ``content``.

    Args:
        resolved: The resolved configuration; ``ALIKE`` settings change no result and do not count.
        content: Hashes of what the configuration points to: weights, data, classes of the user's own.
    """
    return digest([SCHEMA, without(_counted(resolved), ALIKE), content])


def without(settings: dict[str, Any], paths: Iterable[str]) -> dict[str, Any]:
    """Return a copy of settings without those at some dotted paths."""
    kept = deepcopy(settings)
    for path in paths:
        *parents, last = path.split(".")
        node = kept
        for parent in parents:
            node = node.get(parent, {})
        node.pop(last, None)
    return kept


def _counted(node: Any) -> Any:
    """Return a copy of settings in which 1 and 1.0 are one number, and a class is its name."""
    if isinstance(node, dict):
        return {key: _named(key, child) if key == _TARGET else _counted(child) for key, child in node.items()}
    if isinstance(node, list):
        return [_counted(child) for child in node]
    return float(node) if isinstance(node, int) and not isinstance(node, bool) else node


# Settings that may name a class by its path.
_CLASSES = ("task.metric",)


def _named(key: str, target: str) -> str:
    return located(key, target, "class").__qualname__


def _targets(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield the classes that a configuration names, with the settings that name them."""
    for name, child in node.items() if isinstance(node, dict) else ():
        place = f"{key}.{name}".lstrip(".")
        if name == _TARGET or (place in _CLASSES and isinstance(child, str) and "." in child):
            yield place, child
        else:
            yield from _targets(child, place)


def own_sources(run: Run) -> dict[str, str]:
    """Return the hash of the modules of a user's own classes, where a run has any: to edit one makes another run."""
    found = {key: located(key, target, "class") for key, target in _targets(run.resolved)}
    own = {key: source(key, cls) for key, cls in found.items() if outside(cls)}
    return {OWN: digest(own)} if own else {}


def folder_of(run: Run, content: dict[str, str]) -> RunFolder:
    """Return the folder of a run: readable name, and the hash of its configuration, weights and data."""
    key = run_key(run.resolved, content)[:8]
    mixture = f"-p{run.harmful_ratio:g}-s{run.seed}" if run.finetune else ""
    name = f"{run.model.name}-{run.task.name}-{run.method}{mixture}-{key}"
    return RunFolder(Path(run.output_root) / "runs" / name, writes=distributed.rank() == 0)


def _content(row: TaskRow) -> list[Any]:
    """Return what of a row a run depends on."""
    said = [row.prompt, row.response, row.gold]
    return [*said, [list(turn) for turn in row.before]] if row.before else said


def content_of(run: Run, begin: Start, data: TaskData) -> dict[str, str]:
    """Return hashes of what a run starts from and is trained on."""
    parts = (data.train, data.validation, data.test)
    before = base(run, begin) if begin.before or run.constraint.requirements.base_weights else None
    return {
        "weights_content": begin.folder.content,
        "base_content": before.content if before is not None else "",
        "task_data_sha256": digest([[_content(row) for row in part] for part in parts]),
        "pools_sha256": digest(
            [
                [[row.prompt, compliance(row), refusal(row)] for row in rows]
                for pools in begin.pools.rows.values()
                for rows in pools.values()
            ]
        ),
        **_attack(run),
        **({} if run.task.system is None else {SYSTEM_PROMPT: digest(run.task.system)}),
        **own_sources(run),
    }


def _attack(run: Run) -> dict[str, str]:
    """Return the hash of the rows that an attack brings with it, where the run uses them."""
    others = run.attack.others(())
    return {} if others is None else {ATTACK_ROWS: digest([[row.prompt, row.response] for row in others])}


_known: dict[str, dict[str, str]] = {}
_dealt: dict[str, Pools] = {}


def start_key(run: Run) -> str:
    """Return what runs that start alike have in common: the settings that weights and data come of."""
    groups = ("model", "profile", "task", "data", "align", "cache_root")
    trainer = (run.trainer.max_length, run.trainer.accelerator)
    base_named = run.model.align == "none" and run.constraint.requirements.base_weights
    return digest([{group: run.resolved[group] for group in groups}, trainer, base_named, _attack(run)])


def probe_key(run: Run) -> str:
    """Return what runs have in common whose start computes the same on the prompts of diagnostics."""
    groups = ("constraint", "sae", "forms")
    asked = (run.evaluation.split, run.diagnostics.n_prompts)
    return digest([start_key(run), asked, str(run.dtype), {group: run.resolved.get(group) for group in groups}])


def known(key: str) -> dict[str, str] | None:
    """Return the ``identity`` of a ``start_key``, where this process has found it out."""
    return _known.get(key)


def identity(run: Run, say: Callable[[str], None]) -> dict[str, str]:
    """Return the hashes of ``content_of``; those of a start are remembered for runs of one process that start alike."""
    key = start_key(run)
    if key not in _known:
        dealt = digest(run.resolved["data"])
        pools = _dealt[dealt] if dealt in _dealt else _dealt.setdefault(dealt, build_pools(run.data))
        data = pools.task_rows(run.data, run.task)
        content = content_of(run, start(run, say, pools), data)
        _known[key] = {name: value for name, value in content.items() if name != OWN}
    return _known[key] | own_sources(run)
