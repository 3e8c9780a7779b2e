"""Fit a model under a defence with Lightning."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from cwac_lab.core import distributed
from cwac_lab.core.cache import digest
from cwac_lab.core.errors import Diverged, LabError, MissingAsset
from cwac_lab.core.progress import Meter
from cwac_lab.data.batches import collate
from cwac_lab.defenses.interface import Defense
from cwac_lab.models.answers import answer_loss, to_device
from cwac_lab.models.chat import Encoded
from cwac_lab.training.checkpoint import Resume, SafeCheckpoint, resumed
from cwac_lab.training.module import FineTuning, TrainData
from cwac_lab.training.settings import INCIDENTAL_TRAINER, LoggerConfig, TrainerConfig


@contextmanager
def loggers(config: LoggerConfig, folder: Path, name: str, settings: dict[str, Any]) -> Iterator[list[Any]]:
    """Make the loggers of a run; its run in Weights & Biases ends with it, so that the next one gets its own.

    Args:
        config: Settings.
        folder: Folder of the run.
        name: Name of the run.
        settings: Become the run's config in Weights & Biases.

    Raises:
        MissingAsset: If Weights & Biases does not take the run, before anything is computed.
    """
    # A resumed run writes a further log; Lightning would empty the one that is there.
    earlier = len(list(folder.glob("log*"))) if resumed(folder / "checkpoint") else 0
    version = f"log{earlier}" if earlier else "log"
    made: list[Any] = [CSVLogger(folder, name="", version=version, flush_logs_every_n_steps=10)]
    if config.wandb == "off":
        yield made
        return
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    outer, failed = wandb.run, 1  # a run that the caller has begun is the caller's to end
    # Begun here: Lightning would pass a setting that wandb has dropped, which wandb warns of.
    mode: Literal["offline"] | None = "offline" if config.wandb == "offline" else None
    if outer is None:
        try:
            wandb.init(name=name, project=config.project, config=settings, dir=folder, mode=mode, resume="allow")
        except wandb.Error as error:
            raise MissingAsset(f"logger.wandb={config.wandb}: {error} (accepted: offline, off)") from error
    try:
        assert wandb.run is not None
        if outer is None:
            wandb.run.define_metric("trainer/global_step")
            wandb.run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        made.append(WandbLogger(save_dir=folder, experiment=wandb.run))
        yield made
        failed = 0
    finally:
        if outer is None and wandb.run is not None:
            with suppress(wandb.Error):  # the record does not depend on it
                wandb.finish(exit_code=failed)


class _Progress(L.Callback):
    """Tells how far training is; of several processes the first one does."""

    def __init__(self, steps: int, first: int, accumulate: int) -> None:
        self._meter, self._first, self._accumulate = Meter("training, steps", steps, first), first, accumulate

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to tell."""
        if trainer.is_global_zero:
            self._meter.__enter__()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note what is done, and the loss."""
        self._meter.done = self._first + (batch_idx + 1) // self._accumulate
        loss = trainer.callback_metrics.get("loss/task")
        self._meter.note = "" if loss is None else f"loss {float(loss):.3f}"

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """End, whatever ended the training."""
        self._meter.__exit__()


def fit(
    model: Any, examples: Sequence[Encoded], pad_id: int, defense: Defense, config: TrainerConfig, seed: int,
    *, loggers: Sequence[Any] = (), checkpoint: Path | None = None, callbacks: Sequence[L.Callback] = (),
    alone: bool = False, group: str = "trainer", others: Sequence[Encoded] = (),
) -> dict[str, float]:  # fmt: skip
    """Train a model in place under a prepared defence; resumes where ``checkpoint`` holds an unfinished run.

    Args:
        model: The model at its start; the defence is prepared on it.
        examples: Encoded training rows.
        pad_id: Id to pad with.
        defense: The defence; its hooks are called.
        config: Settings.
        seed: Seed of the order of batches.
        loggers: Lightning loggers.
        checkpoint: Folder of resumable checkpoints.
        callbacks: Further Lightning callbacks.
        alone: Leave the other processes of the run out of it.
        group: Where the settings stand in the configuration, for errors.
        others: Rows that a callback may put in the place of a step's.

    Returns:
        Optimizer steps, answer tokens trained on, and the number of trained parameters. A callback may end it early.

    Raises:
        Diverged: If loss or gradients are not finite, from the first such step on.
    """
    _calm()
    device = model.device
    identity = _identity(config, seed, examples)
    resume = Resume.find(checkpoint, identity) if checkpoint is not None else None
    first = resume.step if resume is not None else 0
    data = TrainData(examples, pad_id, config.batch_size, config.epochs, seed, first, config.accumulate)
    data.plan = data.plan[: config.max_steps]
    steps = len(data.plan)
    restore = resume.optimizer(model) if resume is not None else None
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not trained:
        raise LabError("nothing is left to train: what the constraint leaves free has no part in what tuning trains")
    defense.begin(steps, [*examples, *others])
    if resume is not None:
        resume.weights(model, defense)
    module = FineTuning(model, defense, config, steps, first, restore)
    called = [*callbacks, *([_Progress(steps, first, config.accumulate)] if config.progress_bar else [])]
    if checkpoint is not None and config.checkpoint_every_n_steps:
        called.append(SafeCheckpoint(checkpoint, config.checkpoint_every_n_steps, identity))
    model.train()
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        if first < steps:
            _trainer(config, loggers, called, alone).fit(module, datamodule=data)
            module.look()
        model.gradient_checkpointing_disable()
        model.to(device).eval()  # Lightning leaves it on the CPU
        check_finite(model, examples[0], pad_id)
    except Diverged as error:
        clip = f"gradient_clip={config.gradient_clip:g}"
        raise Diverged(f"{error} ({group}.learning_rate={config.learning_rate:g}, {clip})") from None
    return {"steps": module.step, "answer_tokens": data.answer_tokens(module.step), "trained_parameters": trained}


def _identity(config: TrainerConfig, seed: int, examples: Sequence[Encoded]) -> str:
    """Return what a checkpoint must have been made of for a run to go on from it."""
    settings = {key: value for key, value in asdict(config).items() if key not in (*INCIDENTAL_TRAINER, "devices")}
    return digest([seed, settings, [[e.input_ids, e.labels] for e in examples]])


def n_steps(examples: Sequence[Encoded], config: TrainerConfig, seed: int) -> int:
    """Return how many optimizer steps ``fit`` takes."""
    data = TrainData(examples, 0, config.batch_size, config.epochs, seed, 0, config.accumulate)
    return len(data.plan[: config.max_steps])


@torch.no_grad()
def check_finite(model: Any, example: Encoded, pad_id: int) -> None:
    """Check that a model still computes numbers: its last step may have ruined it unseen.

    Raises:
        Diverged: If its loss on a row is not finite.
    """
    if not answer_loss(model, to_device(collate([example], pad_id), model.device)).isfinite():
        raise Diverged("loss is not finite after the last step")


def _trainer(config: TrainerConfig, loggers: Sequence[Any], callbacks: list[L.Callback], alone: bool) -> L.Trainer:
    return L.Trainer(
        max_epochs=1,
        accelerator=config.accelerator,
        **_processes(config, alone),
        precision=config.precision,
        accumulate_grad_batches=config.accumulate,
        gradient_clip_val=config.gradient_clip or None,
        logger=list(loggers) or False,
        callbacks=callbacks,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def _processes(config: TrainerConfig, alone: bool) -> dict[str, Any]:
    """Return Lightning's settings for one process or for those of the run."""
    if alone or distributed.world() == 1:
        # Lightning would move to the first GPU, where this process may have taken another.
        return {"devices": [torch.cuda.current_device()] if config.device.type == "cuda" else 1}
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    # What buffers there are (rotary frequencies, bases) never changes.
    strategies = {
        "ddp": lambda: DDPStrategy(broadcast_buffers=False, timeout=distributed.TIMEOUT),
        "fsdp": lambda: ModelParallelStrategy(data_parallel_size=distributed.world(), tensor_parallel_size=1),
    }
    return {
        "devices": here,
        "num_nodes": distributed.world() // here,
        "strategy": strategies[config.strategy](),
    }


def _calm() -> None:
    """Hide Lightning's hints that do not concern a user of this tool."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning.*")
    # The names that transformers 5.17 has as well.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)
