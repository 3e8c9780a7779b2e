"""How a run trains and where it logs, checked; read without what training needs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from cwac_lab.core.errors import in_range, one_of

PRECISIONS = ("32-true", "bf16-true", "bf16-mixed")
# Settings that change nothing of what is computed, but for rounding.
INCIDENTAL_TRAINER = ("progress_bar", "export", "checkpoint_every_n_steps", "gradient_checkpointing", "strategy")
STRATEGIES = ("ddp", "fsdp")
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")


@dataclass
class TrainerConfig:
    """The ``trainer`` group.

    Attributes:
        epochs: Passes over the mixture.
        max_steps: Optimizer steps after which training ends, if the passes are not over; null: no such limit.
        batch_size: Rows per forward, of all devices together: a run does not depend on how many there are.
        accumulate: Forwards per optimizer step.
        learning_rate: Peak learning rate of AdamW. ``conf/trainer`` has 3e-4 for a start that the project aligned.
        weight_decay: Decoupled weight decay, on matrices only.
        schedule: Learning-rate schedule, one of ``SCHEDULES``.
        warmup_share: Share of the steps with linear warm-up (not for ``constant``).
        gradient_clip: Largest gradient norm; 0 means no clipping.
        max_length: Tokens a conversation is cut to.
        precision: Lightning precision, one of ``PRECISIONS``.
        accelerator: Lightning accelerator (``cpu``, ``cuda``, ``auto``).
        devices: Number of devices of this machine, each with a process of its own.
        strategy: ``ddp``: every device holds the model; ``fsdp``: its weights, gradients and moments are sharded.
        gradient_checkpointing: Keep only each layer's input for the backward pass and compute the rest again: less
            memory, more time.
        checkpoint_every_n_steps: Optimizer steps between resumable checkpoints; 0 means none.
        export: Save the fine-tuned model into the run folder.
        progress_bar: Show how far training is.
    """

    epochs: int = 1
    max_steps: int | None = None
    batch_size: int = 8
    accumulate: int = 1
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    schedule: str = "linear"
    warmup_share: float = 0.1
    gradient_clip: float = 1.0
    max_length: int = 512
    precision: str = "32-true"
    accelerator: str = "cpu"
    devices: int = 1
    strategy: str = "ddp"
    gradient_checkpointing: bool = False
    checkpoint_every_n_steps: int = 0
    export: bool = True
    progress_bar: bool = True

    def __post_init__(self) -> None:
        """Check the fields."""
        for key in ("epochs", "batch_size", "accumulate"):
            in_range(key, getattr(self, key), 1)
        if self.max_steps is not None:
            in_range("max_steps", self.max_steps, 1)
        in_range("devices", self.devices, 1)
        one_of("strategy", self.strategy, STRATEGIES)
        in_range("max_length", self.max_length, 16)
        in_range("learning_rate", self.learning_rate, 0, open_low=True)
        for key in ("weight_decay", "gradient_clip", "checkpoint_every_n_steps"):
            in_range(key, getattr(self, key), 0)
        in_range("warmup_share", self.warmup_share, 0, 1)
        one_of("schedule", self.schedule, SCHEDULES)
        one_of("precision", self.precision, PRECISIONS)
        one_of("accelerator", self.accelerator, ("auto", "cpu", "cuda", "mps"))

    @property
    def device(self) -> torch.device:
        """The device that models are prepared, trained and evaluated on."""
        if self.accelerator != "auto":
            return torch.device(self.accelerator)
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """The type that weights are loaded in."""
        return torch.bfloat16 if self.precision == "bf16-true" else torch.float32

    def autocast(self) -> torch.autocast:
        """Return a new context in which a forward computes as in training."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16-mixed")


@dataclass
class GuardConfig:
    """The ``guard`` group: acts while a model is trained, where its answers leave those of the start.

    What is watched is the divergence ``KL(start || now)`` in nats at the first five tokens of refusals to reference
    prompts: none of the prompts that a run is evaluated on.

    Attributes:
        kl: Largest mean divergence; null: no guard.
        do: ``stop``: training ends where it is larger; ``rollback``: it ends with the weights of the last look where it
            was not; ``replay``: the next steps train on refusals in the place of task rows, then it goes on.
        every_n_steps: Optimizer steps between two looks; the last step is looked at too.
        n_prompts: Reference prompts that are watched, at most.
        replay_steps: Steps of one ``replay``; at most as many as there are between two looks.
    """

    kl: float | None = None
    do: str = "stop"
    every_n_steps: int = 10
    n_prompts: int = 16
    replay_steps: int = 2

    def __post_init__(self) -> None:
        """Check the fields."""
        if self.kl is not None:
            in_range("kl", self.kl, 0, open_low=True)
        one_of("do", self.do, ("stop", "rollback", "replay"))
        for key in ("every_n_steps", "n_prompts"):
            in_range(key, getattr(self, key), 1)
        in_range("replay_steps", self.replay_steps, 1, self.every_n_steps if self.do == "replay" else math.inf)


@dataclass
class LoggerConfig:
    """The ``logger`` group: a CSV file is always written; Weights & Biases can be added.

    Attributes:
        wandb: ``offline`` (files in the run folder), ``online`` or ``off``.
        project: Project name for Weights & Biases.
    """

    wandb: str = "offline"
    project: str = "cwac-lab"

    def __post_init__(self) -> None:
        """Check the fields."""
        one_of("wandb", self.wandb, ("offline", "online", "off"))
