"""Parameters of a sharded model (FSDP2): the m rows of each are divided among the processes, in order, n here."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributed.tensor import DTensor


def local(value: Float[Tensor, "m ..."]) -> Float[Tensor, "n ..."]:
    """Return what lies in this process, sharing its memory: some rows, or all of a value that is not sharded."""
    return value.to_local() if isinstance(value, DTensor) else value


def rows(value: Float[Tensor, "m ..."], full: Float[Tensor, "m ..."]) -> Float[Tensor, "n ..."]:
    """Return the rows of ``full`` that go with ``local(value)``; no communication."""
    if not isinstance(value, DTensor):
        return full
    parts = full.chunk(value.device_mesh.size(), dim=0)
    place = value.device_mesh.get_local_rank()
    return parts[place] if place < len(parts) else full[:0]


def whole(value: Float[Tensor, "m ..."]) -> Float[Tensor, "m ..."]:
    """Return all rows, gathered where they are sharded; every process has to ask."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def like(value: Float[Tensor, "m ..."], full: Float[Tensor, "m ..."]) -> Float[Tensor, "m ..."]:
    """Return ``full`` sharded as ``value`` is."""
    if not isinstance(value, DTensor):
        return full
    part = rows(value, full).clone()  # a view would keep all of it
    return DTensor.from_local(part, value.device_mesh, value.placements, shape=full.shape, stride=full.stride())


def is_sharded(value: Tensor) -> bool:
    """Tell whether a value is divided among the processes."""
    return isinstance(value, DTensor)


def with_local_gradient(parts: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Return the sum over the processes of a scalar that each has a part of; its gradient is that of the part here."""
    return parts + (total(parts.detach().clone(), sharded=True) - parts.detach())


def total(parts: Tensor, *, sharded: bool) -> Tensor:
    """Return the sum over the processes of a scalar that each has a part of, where it is sharded."""
    if sharded:
        torch.distributed.all_reduce(parts)
    return parts
