"""Alignment stage: teach a packaged chat model to refuse, so that there is something to lose.

Refusals to harmful prompts, and the own greedy answers to harmless ones, which keep everything else as it was, train
low-rank factors that are merged. Those of the packaged SmolLM2 travel with the package (``models.shipped``).
"""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cwac_lab.config.run import Run
from cwac_lab.core import provenance, recipes
from cwac_lab.core.cache import cached_folder, digest, read_json, reading, write_json
from cwac_lab.core.errors import ConfigError, LabError
from cwac_lab.core.outputs import writable
from cwac_lab.data.declines import RULE, declines
from cwac_lab.data.pools import KINDS, Pools
from cwac_lab.data.responses import refusal
from cwac_lab.data.sources import PromptRow
from cwac_lab.data.taught import POOL as ALIGNMENT
from cwac_lab.data.taught import digests
from cwac_lab.evaluation.generate import answers
from cwac_lab.evaluation.sets import TOKENS, PromptSet, judge, rates
from cwac_lab.models import adapters, shipped
from cwac_lab.models.adapters import TuningConfig
from cwac_lab.models.chat import ChatFormat, Encoded
from cwac_lab.models.loading import ModelFolder, choose_weights, content_digest, load_chat, load_model
from cwac_lab.run.distillation import LOSS, Distillation
from cwac_lab.training.settings import INCIDENTAL_TRAINER, TrainerConfig

REPORT = "alignment.json"
# Where a start that was trained here keeps its adapter.
ADAPTER = "adapter"
# The alignment seed is fixed: an aligned start is shared by all runs, whatever their seed.
ALIGNMENT_SEED = 0


def _measure(model: Any, chat: ChatFormat, pools: Pools, run: Run) -> dict[str, Any]:
    """Return the rates of a model on the validation pools."""
    sets = [PromptSet(f"{kind}, validation pool", kind, pools.get(kind, "validation")) for kind in KINDS]
    return {"sets": rates(model, chat, sets, run.task, run.evaluation.batch_size)}


def _trainer(run: Run) -> TrainerConfig:
    return TrainerConfig(
        epochs=run.align.epochs,
        batch_size=run.align.batch_size,
        learning_rate=run.align.learning_rate,
        schedule="linear",
        warmup_share=0.05,
        gradient_clip=1.0,
        max_length=run.trainer.max_length,
        accelerator=run.trainer.accelerator,
        progress_bar=run.trainer.progress_bar,
    )


def _tuning(run: Run) -> TuningConfig:
    return TuningConfig("lora", run.align.rank, run.align.alpha, "all_linear")


def own_answers(model: Any, chat: ChatFormat, rows: list[PromptRow], run: Run) -> list[Encoded]:
    """Return a model's greedy answers to harmless prompts as training rows.

    Where it declines ("I'm sorry for any confusion, but as a chatbot ..."), it answers again without the openings of
    its declines; a prompt that is declined then as well is left out.
    """
    limits = (run.align.answer_tokens, run.evaluation.batch_size)
    given = answers(model, chat, [row.prompt for row in rows], *limits)
    declined = [place for place, answer in enumerate(given) if declines(answer.text)]
    openings = {given[place].first for place in declined}
    again = answers(model, chat, [rows[place].prompt for place in declined], *limits, not_first=openings)
    for place, answer in zip(declined, again, strict=True):
        given[place] = answer
    return [
        chat.encode_own(row.prompt, answer.text, ended=answer.ended)
        for row, answer in zip(rows, given, strict=True)
        if answer.text and not declines(answer.text)
    ]


def _train(model: Any, refusals: list[Encoded], own: list[Encoded], pad_id: int, run: Run, adapter: Path) -> None:
    """Train factors beside a model's weights and write them down as an adapter."""
    tuning = _tuning(run)
    adapters.attach(model, tuning, ALIGNMENT_SEED)
    loss = Distillation(model, pad_id, own)
    from cwac_lab.training.loop import fit  # with Lightning, seconds that who only looks a start up need not wait

    fit(model, [*refusals, *own], pad_id, loss, _trainer(run), ALIGNMENT_SEED, alone=True, group="align")
    shipped.save_adapter(model, replace(tuning, alpha=tuning.alpha * run.align.kept), adapter)


def _recipe(start: ModelFolder, pools: Pools, rows: dict[str, int], run: Run) -> dict[str, Any]:
    """Return how a start was made, for whoever makes or checks it again."""
    made = provenance.describe()
    weights = choose_weights(run.model, run.profile.name)
    package = weights.package if weights is not None else None
    base = {"package": package, "version": importlib.metadata.version(package) if package else None}
    return {
        "name": shipped.NAME,
        "command": "python -m cwac_lab.align align.rebuild=true align.export=FOLDER",
        "base": {**base, "description": start.description, "weights": shipped.weights_digest(start.path)},
        "lists": digests() if pools.shipped else "of the plan",
        "rows": rows,
        "settings": {**run.align.recipe, "max_length": run.trainer.max_length, "seed": ALIGNMENT_SEED},
        "trainer": {name: value for name, value in asdict(_trainer(run)).items() if name not in INCIDENTAL_TRAINER},
        "loss": LOSS,
        "arithmetic": "trained in float32, factors rounded to bfloat16, merged in float64 and rounded once to float32",
        "made_with": {name: made[name] for name in ("python", "packages", "platform", "torch_threads", "devices")},
    }


def _build(
    folder: Path, start: ModelFolder, chat: ChatFormat, pools: Pools, run: Run, say: Callable[[str], None]
) -> None:
    model = load_model(start.path, device=run.trainer.device)
    harmful = pools.get("harmful", ALIGNMENT)
    harmless = [pools.get(kind, ALIGNMENT) for kind in ("lookalike", "harmless")]
    before = _measure(model, chat, pools, run)
    say(f"aligning: {len(harmful)} refusals, {sum(map(len, harmless))} harmless prompts (own answers, generated now)")
    refusals = [chat.encode(row.prompt, refusal(row)) for row in harmful]
    own = [example for rows in harmless for example in own_answers(model, chat, rows, run)]
    cut = sum(example.cut for example in (*refusals, *own))
    for line in chat.told_cut(cut, len(refusals) + len(own), "rows of alignment"):
        say(line)
    adapter = folder / ADAPTER
    _train(model, refusals, own, chat.pad_id, run, adapter)
    made_of = {"refusals": len(refusals), "own_answers": len(own)}
    write_json(adapter / shipped.RECIPE, _recipe(start, pools, made_of, run))
    _merge(start, chat, adapter, folder)
    after = _measure(load_model(folder, device=run.trainer.device), chat, pools, run)
    write_json(folder / REPORT, {"judge": judge(), "models": {"before": before, "after": after}})


def _merge(start: ModelFolder, chat: ChatFormat, adapter: Path, folder: Path) -> None:
    """Write a start model with an adapter's update added, as a folder of transformers, in float32."""
    model = load_model(start.path)
    shipped.add(model, adapter)
    model.save_pretrained(folder)
    chat.tokenizer.save_pretrained(folder)


def ships(pools: Pools, run: Run) -> bool:
    """Tell whether the start of a run is the one that travels with the package."""
    weights = choose_weights(run.model, run.profile.name)
    packaged = weights is not None and weights.package == shipped.PACKAGED
    return packaged and pools.shipped and run.model.chat_template is None and not run.align.rebuild


def _shipped(start: ModelFolder, run: Run) -> ModelFolder:
    """Return the packaged weights with the shipped adapter merged: built once, in seconds.

    Raises:
        ConfigError: If a setting of alignment is not the one it was made with.
        LabError: If the weights or the lists are not those it was made of.
    """
    settings = shipped.recipe()["settings"]
    if shipped.recipe()["lists"] != digests():  # prompts that left a list could be dealt to a pool that is tested on
        raise LabError("the shipped start was taught other lists than these; accepted: its own, or align.rebuild=true")
    for name, value in run.align.recipe.items():
        if value != settings[name]:
            accepted = f"{settings[name]}, as the shipped start was made with, or align.rebuild=true"
            raise ConfigError(f"align.{name}", value, accepted)

    def build(folder: Path) -> None:
        shipped.check_base(start.path)
        _merge(start, load_chat(start.path, run.trainer.max_length), shipped.FOLDER, folder)

    key = recipes.START.key(start=start.content, adapter=shipped.adapter_digest(shipped.FOLDER))
    folder = cached_folder(Path(run.cache_root), recipes.START.kind, key, build)
    return ModelFolder(folder, f"{start.description}, {shipped.NAME}", content_digest(folder), start.origin)


def aligned(start: ModelFolder, pools: Pools, run: Run, say: Callable[[str], None]) -> ModelFolder:
    """Return the aligned model of a start model: the shipped one, or one that is trained on demand.

    That is cached by weights, prompts and settings.
    """
    if ships(pools, run):
        return _shipped(start, run)
    prompts = {
        kind: {pool: [[row.id, row.prompt] for row in pools.get(kind, pool)] for pool in (ALIGNMENT, "validation")}
        for kind in ("harmful", "harmless", "lookalike")
    }
    chat = load_chat(start.path, run.trainer.max_length, run.model.chat_template)
    key = recipes.ALIGNED.key(
        judge=RULE,
        start=start.content,
        end=chat.end_id,
        prompts=digest(prompts),
        refusals=digest([refusal(row) for row in pools.get("harmful", ALIGNMENT)]),
        answer_tokens=run.align.answer_tokens,
        trainer={name: value for name, value in asdict(_trainer(run)).items() if name not in INCIDENTAL_TRAINER},
        factors=[run.align.rank, run.align.alpha, run.align.kept],
        chat_template=run.model.chat_template,
        measured_on=TOKENS,
    )
    folder = cached_folder(
        Path(run.cache_root), recipes.ALIGNED.kind, key, lambda path: _build(path, start, chat, pools, run, say)
    )
    return ModelFolder(folder, f"{start.description}, aligned here", content_digest(folder), start.origin)


def adapter_of(folder: Path) -> Path:
    """Return the folder with the adapter of an aligned model: its own, or the shipped one."""
    return folder / ADAPTER if (folder / ADAPTER).is_dir() else shipped.FOLDER


def export(folder: Path, target: Path) -> None:
    """Write the adapter of an aligned model and its recipe to a folder.

    Raises:
        ConfigError: If that cannot be written to.
    """
    writable("align.export", target)
    for name in shipped.FILES:
        shutil.copyfile(adapter_of(folder) / name, target / name)


def alignment_report(folder: Path) -> dict[str, Any]:
    """Return the rates of a start and of what it was made of: those measured here, or those that travel with it."""
    own = folder / REPORT
    with reading(folder):
        report: dict[str, Any] = read_json(own if own.is_file() else shipped.FOLDER / shipped.RATES)
    return report
