"""One run in several processes: they take the same steps, the first one writes; launched here or by ``torchrun``."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

from cwac_lab.core.errors import ConfigError, LabError

T = TypeVar("T")
R = TypeVar("R")
# The first process may build for long (alignment, an autoencoder) while the others wait.
TIMEOUT = timedelta(hours=12)


def rank() -> int:
    """Return the number of this process among those of its run; 0 where it is alone."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world() -> int:
    """Return how many processes its run has."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def launched() -> bool:
    """Tell whether this process is one of several of a run."""
    return distributed.is_torchelastic_launched()


def number() -> int:
    """Return what ``rank`` will be once the processes have met."""
    return int(os.environ["RANK"]) if launched() else 0


def launch(processes: int, module: str, arguments: Sequence[str]) -> None:
    """Run ``python -m module arguments`` in several processes on this machine, and wait for them.

    Raises:
        LabError: If one of them is lost or ended in an error; the others are ended.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", module, *arguments)
    except ChildFailedError as error:
        number, failure = error.get_first_failure()
        if failure.exitcode > 0:
            raise LabError(f"process {number} of {processes} ended with code {failure.exitcode}, see above") from None
        name = signal.Signals(-failure.exitcode).name
        raise LabError(
            f"process {number} of {processes} was ended by {name}, so the others were; "
            "the same command goes on from the last checkpoint (trainer.checkpoint_every_n_steps)"
        ) from None


@contextmanager
def group(device: torch.device) -> Iterator[None]:
    """Join the processes of this run, if it has several, while the block runs.

    Raises:
        LabError: If another of them is lost.
    """
    if not launched():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield
    except RuntimeError as error:
        # torch has no class of its own for what gloo raises.
        if isinstance(error, distributed.DistError) or "gloo" in str(error):
            raise LabError(f"process {rank()} of {world()} lost the others: {str(error).splitlines()[0]}") from error
        raise
    finally:
        distributed.destroy_process_group()


def check(devices: int) -> None:
    """Check that a launcher from outside started as many processes per machine as the configuration says.

    Raises:
        ConfigError: If not.
    """
    if launched() and int(os.environ["LOCAL_WORLD_SIZE"]) != devices:
        raise ConfigError("trainer.devices", devices, f"{os.environ['LOCAL_WORLD_SIZE']}, as torchrun started")


def wait() -> None:
    """Wait until all processes are here."""
    if world() > 1:
        distributed.barrier()


def told(value: T) -> T:
    """Return the first process's value in all of them."""
    if world() == 1:
        return value
    values: list[Any] = [value]
    distributed.broadcast_object_list(values)
    told_value: T = values[0]
    return told_value


def spread(items: Sequence[T], work: Callable[[Sequence[T]], Sequence[R]]) -> list[R]:
    """Return ``work(items)``, one result an item, where every process does a part; all get the whole."""
    if world() == 1:
        return list(work(items))
    parts: list[Any] = [None] * world()
    mine = items[rank() :: world()]
    distributed.all_gather_object(parts, list(work(mine)) if mine else [])
    return [parts[place % world()][place // world()] for place in range(len(items))]


def summed(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of the processes' tensors of one shape, in place."""
    if world() > 1:
        distributed.all_reduce(tensor)
    return tensor


def gathered(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the tensors of all processes, in their order; they may differ in the first dimension."""
    if world() == 1:
        return [tensor]
    parts: list[Any] = [None] * world()
    distributed.all_gather_object(parts, tensor)
    return parts
