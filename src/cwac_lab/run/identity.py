"""Which run a configuration comes to: its key of settings, weights and data, and its folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cwac_lab.config.run import INCIDENTAL, Run
from cwac_lab.core import distributed
from cwac_lab.core.cache import digest
from cwac_lab.data.pools import build_pools
from cwac_lab.data.responses import compliance, refusal
from cwac_lab.data.sources import TaskData
from cwac_lab.results import store
from cwac_lab.results.store import RunFolder
from cwac_lab.run.start import Start, base, start


def folder_of(run: Run, content: dict[str, str]) -> RunFolder:
    """Return the folder of a run: readable name, and the hash of its configuration, weights and data."""
    key = store.run_key(run.resolved, INCIDENTAL, content)[:8]
    mixture = f"-p{run.harmful_ratio:g}-s{run.seed}" if run.finetune else ""
    name = f"{run.model.name}-{run.task.name}-{run.method}{mixture}-{key}"
    return RunFolder(Path(run.output_root) / "runs" / name, writes=distributed.rank() == 0)


def content_of(run: Run, begin: Start, data: TaskData) -> dict[str, str]:
    """Return hashes of what a run starts from and is trained on."""
    parts = (data.train, data.validation, data.test)
    before = base(run, begin) if begin.before or run.constraint.requirements.base_weights else None
    return {
        "weights_content": begin.folder.content,
        "base_content": before.content if before is not None else "",
        "task_data_sha256": digest([[[row.prompt, row.response, row.gold] for row in part] for part in parts]),
        "pools_sha256": digest(
            [
                [[row.prompt, compliance(row), refusal(row)] for row in rows]
                for pools in begin.pools.rows.values()
                for rows in pools.values()
            ]
        ),
        **_attack(run),
    }


def _attack(run: Run) -> dict[str, str]:
    """Return the hash of the rows that an attack brings with it, where the run uses them."""
    others = run.attack.others(())
    return {} if others is None else {store.ATTACK_ROWS: digest([[row.prompt, row.response] for row in others])}


_known: dict[str, dict[str, str]] = {}


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
    """Return hashes of what a run starts from, remembered for runs of one process that start alike."""
    key = start_key(run)
    if key not in _known:
        pools = build_pools(run.data)
        data = pools.task_rows(run.data, run.task)
        _known[key] = content_of(run, start(run, say, pools), data)
    return _known[key]
