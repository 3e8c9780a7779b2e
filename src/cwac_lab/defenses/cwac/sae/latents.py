"""Score latents by how much they belong to refusing, choose the most safety-critical ones, export their directions."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from cwac_lab.core.cache import read_json, reading, write_json
from cwac_lab.core.progress import track
from cwac_lab.data.batches import pad
from cwac_lab.models.capture import layer_outputs, penalty_positions
from cwac_lab.models.sites import decoder_layers


@dataclass(frozen=True)
class FeatureSpec:
    """What a defence asks of the sparse autoencoder; also part of its cache key.

    Attributes:
        depths: Relative depths in [0, 1) of the layers whose output is read.
        n_latents: Number of safety latents S per layer.
        selection: How latents are scored.
        positions: ``all`` prompt tokens but sinks, or the ``last`` ``n_last`` ones.
        n_last: Number of last prompt tokens with ``positions=last``.
        held_on: ``harmful`` reference prompts or ``both`` kinds; the latents' scale is measured there (the model's own
            form of them).
    """

    depths: tuple[float, ...]
    n_latents: int
    selection: str
    positions: str
    n_last: int
    held_on: str = "harmful"


@dataclass(frozen=True)
class LayerFeatures:
    """The encoder of one layer's autoencoder, reduced to what a penalty needs.

    Attributes:
        layer: Index of the decoder layer whose output is encoded.
        weight: Encoder including the decoder norms, shape (D, F).
        bias: Pre-activation at x = 0, shape (F,).
        k: Latents that TopK keeps per token.
        latents: Chosen latents, shape (S,).
        scale: Standard deviation of their pre-activations before fine-tuning, shape (S,).
        signature: What ``signature`` returns for the model they were made for; None in folders that lack it.
    """

    layer: int
    weight: Float[Tensor, "D F"]
    bias: Float[Tensor, " F"]
    k: int
    latents: Int[Tensor, " S"]
    scale: Float[Tensor, " S"]
    signature: Float[Tensor, "8 D"] | None = None

    def to(self, device: torch.device) -> LayerFeatures:
        """Return a copy whose tensors are on a device."""
        moved = {name: getattr(self, name).to(device) for name in ("weight", "bias", "latents", "scale")}
        return replace(self, **moved)


def topk_codes(
    x: Float[Tensor, "N D"], weight: Float[Tensor, "D F"], bias: Float[Tensor, " F"], k: int
) -> Float[Tensor, "N F"]:
    """Return the TopK codes of residuals, shape (N, F)."""
    pre = x @ weight + bias
    top = pre.topk(k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())


def residuals(
    model: Any, layer: int, prompts: Sequence[Sequence[int]], spec: FeatureSpec, pad_id: int
) -> Float[Tensor, "N D"]:
    """Return the residuals after a layer at the penalty's positions of some prompts, shape (N, D), on the CPU."""
    rows = []
    with torch.no_grad():
        for prompt in track(prompts, f"reading residuals after layer {layer}, prompts"):
            ids, mask = pad([prompt], pad_id)
            ids, mask = ids.to(model.device), mask.to(model.device)
            x = layer_outputs(model, [layer], ids, mask)[layer]
            rows.append(x[penalty_positions(x, mask, spec.positions, spec.n_last)].float().cpu())
    return torch.cat(rows)


@torch.no_grad()
def signature(model: Any, layer: int) -> Float[Tensor, "8 D"]:
    """Return what tells models apart: residuals after a layer at the end of one row of tokens, (8, D), on the CPU."""
    ids = torch.arange(8, 40, device=model.device)[None]  # in any vocabulary
    return layer_outputs(model, [layer], ids, torch.ones_like(ids))[layer][0, -8:].float().cpu()


def attribution(
    model: Any, layer: int, prompts: Sequence[Sequence[int]], spec: FeatureSpec, pad_id: int,
    refusal_ids: Sequence[int], encoder: tuple[Tensor, Tensor, int], decoder_weight: Float[Tensor, "F D"],
) -> Float[Tensor, " F"]:  # fmt: skip
    """Return activation times gradient of the refusal log-probability, averaged over positions, shape (F,).

    The refusal log-probability is that of the first answer token being one that opens a refusal. A latent's
    gradient is the residual's gradient along its decoder direction.

    Args:
        model: The aligned model.
        layer: Hooked layer.
        prompts: Harmful prompts as token ids.
        spec: Positions that count.
        pad_id: Id to pad with.
        refusal_ids: First tokens of refusals.
        encoder: Weight (D, F), bias (F,) and k.
        decoder_weight: Decoder directions, shape (F, D).
    """
    total, count = torch.zeros(decoder_weight.shape[0]), 0
    for prompt in track(prompts, f"attributing refusals to latents of layer {layer}, prompts"):
        ids, mask = pad([prompt], pad_id)
        ids, mask = ids.to(model.device), mask.to(model.device)
        kept: list[Tensor] = []

        def hook(_: torch.nn.Module, __: Any, output: Any, kept: list[Tensor] = kept) -> None:
            x = output[0] if isinstance(output, tuple) else output
            x.retain_grad()
            kept.append(x)

        handle = decoder_layers(model)[layer].register_forward_hook(hook)
        try:
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0, -1].float()
        finally:
            handle.remove()
        logits.log_softmax(-1)[list(refusal_ids)].logsumexp(-1).backward()
        x = kept[0]
        assert x.grad is not None
        held = penalty_positions(x, mask, spec.positions, spec.n_last)
        gradient = x.grad[held].float().cpu() @ decoder_weight.T
        total += (topk_codes(x.detach()[held].float().cpu(), *encoder) * gradient).sum(0)
        count += int(held.sum())
    model.zero_grad(set_to_none=True)
    return total / max(count, 1)


def score(
    selection: str,
    harmful: Float[Tensor, "N F"],
    benign: Float[Tensor, "M F"],
    attributed: Float[Tensor, " F"] | None,
    seed: int,
) -> Float[Tensor, " F"]:
    """Return the score of every latent, shape (F,); higher means more safety-critical.

    Args:
        selection: ``mean_difference`` (mean code on refused harmful prompts minus mean on benign ones),
            ``frequency_difference`` (the same for the share of positions where it fires), ``attribution``, or
            ``random`` (a control among latents that fire on harmful prompts).
        harmful: Codes on refused harmful prompts, shape (N, F).
        benign: Codes on benign prompts, shape (M, F).
        attributed: Attribution scores, shape (F,), where asked for.
        seed: Seed of the random control.
    """
    if selection == "mean_difference":
        return harmful.mean(0) - benign.mean(0)
    if selection == "frequency_difference":
        return (harmful > 0).float().mean(0) - (benign > 0).float().mean(0)
    if selection == "attribution":
        assert attributed is not None
        return attributed
    source = random.Random(f"latents/{seed}")
    return torch.tensor([source.random() for _ in range(harmful.shape[1])]) * (harmful > 0).any(0)


def export(
    folder: Path,
    layer: int,
    encoder: tuple[Float[Tensor, "D F"], Float[Tensor, " F"], int],
    chosen: Int[Tensor, " S"],
    scores: Float[Tensor, " F"],
    scale: Float[Tensor, " S"],
    facts: dict[str, Any],
    signature: Float[Tensor, "8 D"],
) -> None:
    """Save what fine-tuning needs of one layer: encoder, chosen latents (S,), their scale (S,), report, signature."""
    weight, bias, k = encoder
    tensors = {"weight": weight, "bias": bias, "latents": chosen, "scale": scale, "scores": scores[chosen]}
    tensors["signature"] = signature
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / f"layer{layer}.safetensors")
    write_json(folder / f"layer{layer}.json", {"layer": layer, "k": k, **facts})


def load(folder: Path) -> tuple[LayerFeatures, ...]:
    """Load what ``export`` saved, for all layers, without importing sae_lens.

    Raises:
        LabError: If it is damaged.
    """
    found = []
    with reading(folder):
        for path in sorted(folder.glob("layer*.json")):
            facts, tensors = read_json(path), load_file(path.with_suffix(".safetensors"))
            parts = {name: tensors[name] for name in ("weight", "bias", "latents", "scale")}
            known = tensors.get("signature")
            found.append(LayerFeatures(layer=facts["layer"], k=facts["k"], signature=known, **parts))
    return tuple(sorted(found, key=lambda features: features.layer))
