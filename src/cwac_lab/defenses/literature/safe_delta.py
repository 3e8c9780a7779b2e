"""Safe Delta (Lu et al. 2025, arXiv 2505.12038): after training, updates are taken back that cost refusals too much.

Per linear layer with inputs x on prompts and refusals, ``H = 2/n sum x x^T`` plus a damping of its diagonal, and U is
the upper Cholesky factor of ``H^-1``. Entry ij of the update costs ``(dW_ij / U_jj)^2``. Columns are taken in the order
of their price ``1 / U_jj^2``, the dearest share of the entries never, as long as the costs sum to at most

    s / 2 * m / 4096 * mean of the price

in a block of 2,048 columns. What is taken is kept, all else goes back to the start, and columns behind it move so that
the layer's outputs on these inputs stay (the compensation of SparseGPT, Frantar and Alistarh 2023).

Fidelity: exact as released, with its constants of Llama-2's shapes (4096, 2048) and its groups of four columns, within
which there is no compensation. As there, embeddings, norms and head go back to the start (``others=start``).
Deviations: H is of the one pool of refusal data, where the paper lets the model answer 128 prompts under four
templates; of entries with the same price the rows are taken in their order, where the released order is left open.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cwac_lab.core.errors import in_range, one_of
from cwac_lab.core.linalg import full_float32
from cwac_lab.core.progress import track
from cwac_lab.defenses.cwac.subspace.reading import batched, fill, passes
from cwac_lab.defenses.cwac.subspace.spec import SubspaceSpec
from cwac_lab.defenses.interface import Context, Defense, Requirements
from cwac_lab.models.adapters import held_weight
from cwac_lab.models.sites import SCOPES, Site, linears

# As released: columns that share a budget, columns without compensation between them, Llama-2's rows.
BLOCK, GROUP, ROWS = 2048, 4, 4096


class _Inputs:
    """Adds up ``sum x x^T`` of the inputs of a site, in float64."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.moment = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, rows: Float[Tensor, "N d"], labels: Int[Tensor, " N"]) -> None:
        self.moment += rows.T @ rows


def factor(moment: Float[Tensor, "d d"], damping: float) -> Float[Tensor, "d d"]:
    """Return the upper Cholesky factor of the inverse of a damped H.

    Args:
        moment: H up to a factor, which cancels in what is kept where all inputs are used; those that are always zero
            count as one.
        damping: What is added to the diagonal, of its mean.
    """
    damped = moment.double().clone()
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += damping * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)


def kept(
    update: Float[Tensor, "m c"], diagonal: Float[Tensor, " c"], strength: float | None, excluded: float
) -> Float[Tensor, "m c"]:
    """Return which entries of a block's update are kept, as booleans.

    Args:
        update: What the entries would move by.
        diagonal: Of U.
        strength: s; None sets no limit to the sum of the costs.
        excluded: Share of the entries, the dearest, that is never kept.
    """
    price = diagonal.double().pow(-2)
    order = price.argsort(stable=True)
    costs = (update.double().square() * price)[:, order].T.flatten()
    allowed = torch.arange(len(costs), device=costs.device) < len(costs) - int(excluded * len(costs))
    if strength is not None:
        budget = strength / 2 * len(update) / ROWS * price.mean()
        allowed &= costs.cumsum(0) <= budget
    found = torch.empty_like(update, dtype=torch.bool)
    found[:, order] = allowed.view(len(order), -1).T
    return found


def restored(
    start: Float[Tensor, "m d"], trained: Float[Tensor, "m d"], upper: Float[Tensor, "d d"], strength: float | None,
    excluded: float, group: int = GROUP,
) -> tuple[Float[Tensor, "m d"], float]:  # fmt: skip
    """Return a layer's weights with the update that is kept and what compensates it, and the share of entries kept.

    Args:
        start: The weight before training.
        trained: The weight after it.
        upper: U.
        strength: s; None sets no limit.
        excluded: Share of the entries of a block that is never kept.
        group: Columns without compensation between them; 1 is exact.
    """
    weight, upper, n = start.clone(), upper.to(start.dtype), 0
    diagonal = upper.diagonal()
    for begin in range(0, weight.shape[1], BLOCK):
        block = slice(begin, min(begin + BLOCK, weight.shape[1]))
        chosen = kept(trained[:, block] - weight[:, block], diagonal[block], strength, excluded)
        n += int(chosen.sum())
        for first in range(block.start, block.stop, group):
            columns = slice(first, min(first + group, block.stop))
            old = weight[:, columns].clone()
            new = torch.where(chosen[:, first - begin : columns.stop - begin], trained[:, columns], old)
            moved = (new - old) / diagonal[columns]
            weight[:, columns] = new
            weight[:, columns.stop :] += moved @ upper[columns, columns.stop :]
    return weight, n / weight.numel()


@dataclass
class SafeDelta(Defense):
    """Take back, after training, what costs refusals too much.

    Attributes:
        strength: The limit s; larger keeps more of the update. Null sets no limit.
        excluded: Share of the entries, the dearest, that always goes back.
        damping: What is added to the diagonal of H, of its mean.
        modules: Scope of linear layers.
        others: What trains outside the scope: ``start`` goes back to it, ``trained`` stays.
    """

    strength: float | None = 0.1
    excluded: float = 0.15
    damping: float = 0.01
    modules: str = "all_linear"
    others: str = "start"

    @property
    def copies(self) -> float:
        """The start and second moments of inputs, in the memory of the CPU."""
        return 2.0

    @property
    def settles_once(self) -> bool:
        """What is left of an update would be limited again."""
        return True

    @property
    def shardable(self) -> bool:
        """Weights are compared whole."""
        return False

    def __post_init__(self) -> None:
        """Check the fields."""
        if self.strength is not None:
            in_range("strength", self.strength, 0)
        in_range("excluded", self.excluded, 0, 1)
        in_range("damping", self.damping, 0, open_low=True)
        one_of("modules", self.modules, SCOPES)
        one_of("others", self.others, ("start", "trained"))

    @property
    def requirements(self) -> Requirements:
        """Refusals, and weights that hold any update."""
        return Requirements(reference_prompts=True, whole_update=True)

    @torch.no_grad()
    def prepare(self, context: Context) -> None:
        """Read the inputs of refusals at the start, and remember the weights."""
        chat = context.chat
        texts = [chat.encode(row.prompt, row.response).input_ids for row in context.refusals]
        self._layers = list(linears(context.model, self.modules))
        sites = {layer.site: layer for layer in self._layers}
        spec = SubspaceSpec(self.modules, None, 0, "all", normalize=False)
        self._moments: dict[Site, Float[Tensor, "d d"]] = {}
        for group in passes({site: 8 * layer.width**2 for site, layer in sites.items()}):
            held = {site: _Inputs(sites[site].width, context.model.device) for site in group}
            with context.autocast():
                fill(held, context.model, batched(texts, None, 16), spec, chat.pad_id)
            self._moments |= {site: held.pop(site).moment.float().cpu() for site in group}
        self._start = [held_weight(layer).cpu() for layer in self._layers]
        inside = {layer.name for layer in self._layers}
        self._others = {
            name: parameter.detach().cpu().clone()
            for name, parameter in context.model.named_parameters()
            if self.others == "start" and parameter.requires_grad and name not in inside and "lora_" not in name
        }
        self._kept: dict[str, float] = {}

    @torch.no_grad()
    def settle(self, model: Any) -> None:
        """Take back what is not kept; adapters must be merged."""
        self._kept = {}
        uppers: dict[Site, Float[Tensor, "d d"]] = {}  # of one site at a time: the layers that read it stand together
        for layer, held in zip(track(self._layers, "taking back updates, layers"), self._start, strict=True):
            weight = layer.weight
            if layer.site not in uppers:
                uppers = {layer.site: factor(self._moments[layer.site].to(weight.device), self.damping)}
            start, trained = held.to(weight.device), weight.float()
            if torch.equal(start, trained):
                continue
            with full_float32(weight.device):
                found, share = restored(start, trained, uppers[layer.site], self.strength, self.excluded)
            weight.copy_(found)
            self._kept[f"{layer.site.name} {layer.name}"] = share
        for name, parameter in model.named_parameters():
            if name in self._others:
                parameter.copy_(self._others[name])

    def summary(self) -> dict[str, Any]:
        """Return the share of entries that is kept, of every matrix that moved."""
        return {"safe_delta_kept": self._kept}
