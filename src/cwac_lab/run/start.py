"""Where a run starts: its weights, and the prompt pools that they were and may be measured on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from cwac_lab.config.run import Run, check_device
from cwac_lab.core.cache import KEY_FILE, reading
from cwac_lab.core.errors import ConfigError
from cwac_lab.core.outputs import check_cache
from cwac_lab.data.mixing import counts
from cwac_lab.data.pools import Pools, build_pools
from cwac_lab.defenses.cwac.weight import WeightConstraint
from cwac_lab.defenses.literature.l2 import L2
from cwac_lab.defenses.literature.pgm import PGM
from cwac_lab.models.architecture import Scope, Use
from cwac_lab.models.chat import ChatFormat
from cwac_lab.models.folder import weight_files
from cwac_lab.models.loading import ModelFolder, examine_here, find, find_base, load_chat, load_model
from cwac_lab.models.sites import stored
from cwac_lab.run.alignment import aligned

Say = Callable[[str], None]


@dataclass(frozen=True)
class Start:
    """Where a run starts: the weights, and the prompt pools they were and may be measured on.

    ``before`` are the weights before alignment, where that was done here.
    """

    folder: ModelFolder
    pools: Pools
    before: ModelFolder | None = None

    def chat(self, run: Run) -> ChatFormat:
        """Return the chat format, for which no weights are loaded."""
        return load_chat(self.folder.path, run.trainer.max_length, run.model.chat_template)

    def load(self, run: Run) -> tuple[Any, ChatFormat]:
        """Return the model, on the run's device and in evaluation mode, and its chat format."""
        path, chat = self.folder.path, self.chat(run)
        with reading(path) if (path / KEY_FILE).is_file() else nullcontext():
            return load_model(path, run.dtype, run.trainer.device), chat


def use_of(run: Run) -> Use:
    """Return what a run does with its model, as far as the model must allow it."""
    scopes = []
    adapted = run.tuning.modules if run.finetune and run.tuning.adapts else None
    if adapted is not None and run.tuning.method == "null_space":
        scopes.append(Scope("tuning.modules", adapted, adapted, "tuning=lora", stored=False, experts=False))
    for name, part in run.constraint.parts.items() if run.finetune else ():
        if (modules := getattr(part, "modules", None)) is not None:
            held = isinstance(part, WeightConstraint)  # others read the start of every matrix from the file
            rank = part.rank if isinstance(part, WeightConstraint) and part.trainable == "constrained" else None
            scopes.append(
                Scope(f"constraint.{name}.modules", modules, modules, "constraint=none", experts=held, rank=rank)
            )
        elif isinstance(part, L2) and adapted is not None:
            scopes.append(Scope("constraint", name, "all_linear", "tuning=full", stored=False))
        elif isinstance(part, PGM):
            scopes.append(Scope("constraint", name, "all_linear", "constraint=none", stored=False))
    if run.finetune and run.attack.rows == "outliers":
        scopes.append(Scope("attack", run.attack.name, "ffn_out", "attack=benign", stored=False, experts=False))
    if run.finetune and run.diagnostics.enabled:
        scopes.append(Scope("diagnostics.enabled", "true", "ffn_out", "false", experts=False))
    return Use(
        tuple(scopes), adapted, run.tuning.base, run.trainer.max_length, run.evaluation.max_new_tokens,
        run.model.chat_template, sharded=run.finetune and run.trainer.strategy == "fsdp",
    )  # fmt: skip


def start(run: Run, say: Say, pools: Pools | None = None) -> Start:
    """Return the start model of a run (aligned where the model asks for it) and the prompt pools.

    Who has read the pools, so that a bad row of the task stops before a start is trained, hands them over.

    Raises:
        LabError: If weights or data are missing, pools overlap, near-duplicates leave too few harmful rows, or there is
            no place for the cache.
    """
    check_device(run)
    use = use_of(run)
    if run.model.given:  # before data are read, where they are not yet; the hub is asked after that
        examine_here(run.model, use)
    check_cache(run.cache_root, say)
    pools = pools or build_pools(run.data)
    for line in pools.told():
        say(line)
    _check_finetune(run, len(pools.get("harmful", "finetune")))
    folder = find(run.model, run.profile.name, Path(run.cache_root), use)
    if run.model.align == "none":
        return Start(folder, pools)
    return Start(aligned(folder, pools, run, say), pools, before=folder)


def _check_finetune(run: Run, held: int) -> None:
    """Check that as many harmful rows were dealt as the mixture has (the plan of the pools had them)."""
    if run.data.n_train is None:  # then the rows are counted when they are mixed
        return
    _, harmful = counts(run.data.n_train, run.harmful_ratio, run.data.mixing)
    if run.finetune and run.attack.rows == "harmful" and harmful > held:
        most = f"at most {held / run.data.n_train:g} with data.n_train={run.data.n_train}"
        left = f"data.near={run.data.near} leaves {held} harmful rows"
        raise ConfigError("harmful_ratio", run.harmful_ratio, f"{most} ({left})")


def base(run: Run, begin: Start) -> ModelFolder:
    """Return the weights before alignment.

    Raises:
        LabError: If the model was aligned elsewhere and its base is not named or not there.
    """
    return begin.before or find_base(run.model, run.profile.name)


def start_weights(folder: Path) -> Callable[[str], torch.Tensor]:
    """Return a reader of single start weights by parameter name, which keeps nothing in memory.

    The reader returns the tensor in its stored type, with the shape of the parameter, e.g. (d_out, d_in). Files of the
    inner model name it without the first part (``transformer.h.0...``), as GPT-2's do.
    """
    where = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as handle:
            where.update(dict.fromkeys(handle.keys(), file))

    def read(name: str) -> torch.Tensor:
        held = stored(name, where)
        if held is None:
            raise KeyError(name)
        with safe_open(where[held], framework="pt") as handle:
            return handle.get_tensor(held)

    return read
