"""What a defence needs before training: start model, subspace, autoencoder; built on demand, cached by content."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from cwac_lab.cache import cached_folder, digest, read_json
from cwac_lab.config import Run
from cwac_lab.data.pools import Pools, build_pools
from cwac_lab.data.responses import REFUSALS, refusal
from cwac_lab.data.sources import split_task
from cwac_lab.defense import Context, Requirements
from cwac_lab.models.chat import ChatFormat
from cwac_lab.models.loading import ModelFolder, find
from cwac_lab.models.sites import depth_to_layer
from cwac_lab.sae import activations, latents
from cwac_lab.sae import train as sae_train
from cwac_lab.sae.latents import FeatureSpec
from cwac_lab.subspace import basis
from cwac_lab.training.alignment import aligned

Say = Callable[[str], None]


@dataclass(frozen=True)
class Start:
    """Where a run starts: the weights, and the prompt pools they were and may be measured on."""

    folder: ModelFolder
    pools: Pools


def start(run: Run, say: Say) -> Start:
    """Return the start model of a run (aligned where the model asks for it) and the prompt pools.

    Raises:
        LabError: If weights or data are missing, or pools overlap.
    """
    pools = build_pools(run.data)
    folder = find(run.model, run.profile.name, Path(run.cache_root))
    return Start(aligned(folder, pools, run, say) if run.model.align != "none" else folder, pools)


def reference_ids(pools: Pools, chat: ChatFormat, kind: str = "harmful") -> list[list[int]]:
    """Return the token ids of the reference prompts of a kind, up to where the answer starts."""
    return [chat.prompt_ids(row.prompt) for row in pools.get(kind, "reference")]


def start_weights(folder: Path) -> Callable[[str], torch.Tensor]:
    """Return a reader of single start weights by parameter name, which keeps nothing in memory.

    The reader returns the tensor in its stored type, with the shape of the parameter, e.g. (d_out, d_in).
    """
    files = sorted(folder.glob("*.safetensors"))
    where = {}
    for file in files:
        with safe_open(file, framework="pt") as handle:
            where.update(dict.fromkeys(handle.keys(), file))

    def read(name: str) -> torch.Tensor:
        with safe_open(where[name], framework="pt") as handle:
            return handle.get_tensor(name)

    return read


def _subspace(run: Run, needs: Requirements, begin: Start, model: Any, chat: ChatFormat, say: Say) -> Path:
    assert needs.subspace is not None
    spec, prompts = needs.subspace, reference_ids(begin.pools, chat)
    key = {"model": begin.folder.content, "dtype": str(model.dtype), "prompts": digest(prompts), **asdict(spec)}

    def build(folder: Path) -> None:
        say(f"building the safety subspace: {spec.modules}, {len(prompts)} reference prompts")
        basis.build(model, prompts, spec, chat.pad_id, folder)

    return cached_folder(Path(run.cache_root), "subspace", key, build)


def _conversations(run: Run, pools: Pools, chat: ChatFormat) -> list[Sequence[int]]:
    """Return the token ids an autoencoder is trained on: refused harmful prompts and benign text, at the set shares."""
    harmful = [
        chat.encode(r.prompt, refusal(r)).input_ids for p in ("reference", "alignment") for r in pools.get("harmful", p)
    ]
    benign = [chat.prompt_ids(row.prompt) for pool in ("reference", "alignment") for row in pools.get("harmless", pool)]
    rows = split_task(run.data, run.task).train[: run.data.n_train]
    benign += [chat.encode(row.prompt, row.response).input_ids for row in rows]
    return activations.blend(harmful, benign, run.sae.n_tokens, run.sae.harmful_share, run.sae.seed)


def _autoencoder(run: Run, layer: int, begin: Start, model: Any, chat: ChatFormat, say: Say) -> Path:
    conversations = _conversations(run, begin.pools, chat)
    key = {
        "model": begin.folder.content,
        "dtype": str(model.dtype),
        "layer": layer,
        "texts": digest(conversations),
        **asdict(run.sae),
    }

    def build(folder: Path) -> None:
        data, held_out = activations.split(conversations, run.sae.held_out, run.sae.seed)
        x = activations.collect(model, layer, data, chat.pad_id)
        y = activations.collect(model, layer, held_out, chat.pad_id, unlike=data)
        say(f"training the autoencoder: layer {layer}, {len(x)} activations, {run.sae.n_latents} latents")
        sae_train.train(x, y, run.sae, f"model.layers.{layer}", folder)

    return cached_folder(Path(run.cache_root), "sae", key, build)


def _layer_features(
    run: Run, spec: FeatureSpec, layer: int, autoencoder: Path, begin: Start, model: Any, chat: ChatFormat, folder: Path
) -> None:
    harmful, benign = reference_ids(begin.pools, chat), reference_ids(begin.pools, chat, "harmless")
    encoder = sae_train.encoder(autoencoder)
    x = latents.residuals(model, layer, harmful, spec, chat.pad_id)
    y = latents.residuals(model, layer, benign, spec, chat.pad_id)
    attributed = None
    if spec.selection == "attribution":
        openings = sorted({chat.encode("", text).input_ids[len(chat.prompt_ids(""))] for text in REFUSALS})
        directions = sae_train.decoder_directions(autoencoder)
        attributed = latents.attribution(model, layer, harmful, spec, chat.pad_id, openings, encoder, directions)
    on_harmful, on_benign = latents.topk_codes(x, *encoder), latents.topk_codes(y, *encoder)
    scores = latents.score(spec.selection, on_harmful, on_benign, attributed, run.sae.seed)
    chosen = scores.topk(spec.n_latents).indices
    pre = x @ encoder[0][:, chosen] + encoder[1][chosen]
    scale = pre.std(0).clamp_min(1e-3 * float(pre.std()))
    facts = {
        "scores": {int(i): round(float(scores[i]), 4) for i in chosen},
        "positions": {"harmful": len(x), "benign": len(y)},
        "quality": read_json(autoencoder / sae_train.REPORT),
    }
    latents.export(folder, layer, encoder, chosen, scores, scale, facts)


def _features(run: Run, needs: Requirements, begin: Start, model: Any, chat: ChatFormat, say: Say) -> Path:
    assert needs.features is not None
    spec = needs.features
    n_layers = model.config.num_hidden_layers
    layers = sorted({depth_to_layer(depth, n_layers) for depth in spec.depths})
    autoencoders = {layer: _autoencoder(run, layer, begin, model, chat, say) for layer in layers}
    references = [reference_ids(begin.pools, chat, kind) for kind in ("harmful", "harmless")]
    key = {
        "autoencoders": {str(layer): path.name for layer, path in autoencoders.items()},
        "prompts": digest(references),
        **asdict(replace(spec, depths=tuple(spec.depths))),
    }

    def build(folder: Path) -> None:
        for layer, path in autoencoders.items():
            say(f"choosing {spec.n_latents} safety latents: layer {layer}, {spec.selection}")
            _layer_features(run, spec, layer, path, begin, model, chat, folder)

    return cached_folder(Path(run.cache_root), "features", key, build)


def artefacts(run: Run, begin: Start, model: Any, chat: ChatFormat, say: Say) -> tuple[Context, dict[str, Any]]:
    """Build or load all that the run's defence needs.

    Returns:
        The context for ``Defense.prepare``, and JSON-able facts (folders' names, reports) for the run record.
    """
    needs, facts = run.constraint.requirements, {}
    subspace = features = None
    if needs.subspace is not None:
        folder = _subspace(run, needs, begin, model, chat, say)
        subspace = basis.load(folder)
        facts["subspace"] = {"folder": folder.name}
    if needs.features is not None:
        folder = _features(run, needs, begin, model, chat, say)
        features = latents.load(folder)
        reports = {path.stem: read_json(path) for path in sorted(folder.glob("layer*.json"))}
        facts["features"] = {"folder": folder.name, **reports}
    context = Context(
        model=model,
        seed=run.seed,
        pad_id=chat.pad_id,
        start_weight=start_weights(begin.folder.path),
        reference=reference_ids(begin.pools, chat) if needs.reference_prompts else [],
        subspace=subspace,
        features=features or (),
    )
    return context, facts
