"""Fully sharded data parallelism (FSDP2, ``fully_shard``) of a model's decoder layers, and back to a plain model.

Embeddings, final norm and head stay whole in every process: they are used outside the forward of a module that could
gather them, and are often one tied matrix.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, distributed
from torch.distributed.fsdp import fully_shard

from cwac_lab.models.shards import is_sharded, local, total, whole
from cwac_lab.models.sites import decoder_layers

_KEPT = ("_parameters", "_modules", "_buffers", "training")


class _Root(torch.nn.Module):
    """Frames whatever runs a model's layers, any number of times, before one backward."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[..., Any], *arguments: Any) -> Any:
        return compute(*arguments)


class Sharded:
    """A model whose decoder layers are sharded, in place."""

    def __init__(self, model: Any, mesh: Any) -> None:
        """Shard them over a mesh of one dimension."""
        layers: list[Any] = list(decoder_layers(model))
        self._plain = [(layer, layer.__class__, {k: copy.copy(v) for k, v in vars(layer).items()}) for layer in layers]
        self.root = _Root(model)
        inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
        others = [parameter for parameter in model.parameters() if id(parameter) not in inside]
        self._others = [parameter for parameter in others if parameter.requires_grad]
        for layer in layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        fully_shard(self.root, mesh=mesh, ignored_params=set(others))

    def average(self) -> None:
        """Average the gradients of what is not sharded; those of the layers are."""
        for parameter in self._others:
            if parameter.grad is not None:
                distributed.all_reduce(parameter.grad)
                parameter.grad /= distributed.get_world_size()

    def undo(self) -> None:
        """Gather the layers and make the model a plain one."""
        for layer, kind, attributes in self._plain:
            layer.reshard()
            for module in layer.modules():
                for name, parameter in module._parameters.items():
                    if parameter is not None and is_sharded(parameter):
                        full: Tensor = whole(parameter.detach())
                        module._parameters[name] = torch.nn.Parameter(full.clone(), parameter.requires_grad)
            layer.__class__ = kind
            held = {name: vars(layer)[name] for name in _KEPT}
            vars(layer).clear()
            vars(layer).update(attributes | held)


def clip_grad_norm(parameters: Iterable[Tensor], most: float) -> Float[Tensor, ""]:
    """Scale gradients, sharded or not, so that their joint norm is at most ``most``; as ``torch.nn.utils`` does.

    Returns:
        The norm before, shape ().
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    squares = {}
    for sharded in (True, False):
        norms = [local(g).norm() for g in gradients if is_sharded(g) is sharded]
        part = torch.stack(norms).square().sum() if norms else torch.zeros((), device=gradients[0].device)
        squares[sharded] = total(part, sharded=sharded)
    norm = (squares[True] + squares[False]).sqrt()
    for gradient in gradients:
        local(gradient).mul_((most / (norm + 1e-6)).clamp(max=1.0))
    return norm
