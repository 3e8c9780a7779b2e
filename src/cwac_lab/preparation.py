"""What a defence needs before training: start model, subspace, autoencoder; built on demand, cached by content."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open

from cwac_lab import artefact, distributed
from cwac_lab.artefact import Recipe
from cwac_lab.baselines.l2 import L2
from cwac_lab.cache import KEY_FILE, cached_folder, digest, read_json, reading
from cwac_lab.config import Run
from cwac_lab.data.mixing import TrainRow, counts
from cwac_lab.data.pools import Pools, build_pools
from cwac_lab.data.responses import REFUSALS, refusal
from cwac_lab.data.sources import PromptRow
from cwac_lab.defense import Context
from cwac_lab.errors import ConfigError, QualityError
from cwac_lab.models.architecture import Scope, Use
from cwac_lab.models.chat import ChatFormat
from cwac_lab.models.folder import named_folder, weight_files
from cwac_lab.models.loading import ModelFolder, examine, find, find_base, load_chat, load_model
from cwac_lab.models.sites import decoder_layers, depth_to_layer
from cwac_lab.outputs import check_cache
from cwac_lab.references import References, references
from cwac_lab.sae import activations, latents
from cwac_lab.sae import train as sae_train
from cwac_lab.sae.latents import FeatureSpec
from cwac_lab.subspace import basis
from cwac_lab.subspace.basis import SubspaceSpec
from cwac_lab.training.alignment import aligned

Say = Callable[[str], None]


@dataclass(frozen=True)
class Start:
    """Where a run starts: the weights, and the prompt pools they were and may be measured on.

    ``before`` are the weights before alignment, where that was done here.
    """

    folder: ModelFolder
    pools: Pools
    before: ModelFolder | None = None

    def load(self, run: Run) -> tuple[Any, ChatFormat]:
        """Return the model, on the run's device and in evaluation mode, and its chat format."""
        path = self.folder.path
        chat = load_chat(path, run.trainer.max_length, run.model.chat_template)
        with reading(path) if (path / KEY_FILE).is_file() else nullcontext():
            return load_model(path, run.dtype, run.trainer.device), chat


def use_of(run: Run) -> Use:
    """Return what a run does with its model, as far as the model must allow it."""
    scopes = []
    adapted = run.tuning.modules if run.finetune and run.tuning.method == "lora" else None
    for name, part in run.constraint.parts.items() if run.finetune else ():
        if (modules := getattr(part, "modules", None)) is not None:
            scopes.append(Scope(f"constraint.{name}.modules", modules, modules, "constraint=none"))
        elif isinstance(part, L2) and adapted is not None:
            scopes.append(Scope("constraint", name, "all_linear", "tuning=full", stored=False))
    if run.finetune and run.attack.rows == "outliers":
        scopes.append(Scope("attack", run.attack.name, "ffn_out", "attack=benign", stored=False))
    if run.finetune and run.diagnostics.enabled:
        scopes.append(Scope("diagnostics.enabled", "true", "ffn_out", "false"))
    return Use(
        tuple(scopes), adapted, run.tuning.base, run.trainer.max_length, run.evaluation.max_new_tokens,
        run.model.chat_template,
    )  # fmt: skip


def start(run: Run, say: Say, pools: Pools | None = None) -> Start:
    """Return the start model of a run (aligned where the model asks for it) and the prompt pools.

    Who has read the pools, so that a bad row of the task stops before a start is trained, hands them over.

    Raises:
        LabError: If weights or data are missing, pools overlap, near-duplicates leave too few harmful rows, or there is
            no place for the cache.
    """
    use = use_of(run)
    if run.model.path is not None:  # before data are read, where they are not yet; the hub is asked after that
        examine(named_folder(run.model.path).resolve(), use)
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

    The reader returns the tensor in its stored type, with the shape of the parameter, e.g. (d_out, d_in).
    """
    where = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as handle:
            where.update(dict.fromkeys(handle.keys(), file))

    def read(name: str) -> torch.Tensor:
        with safe_open(where[name], framework="pt") as handle:
            return handle.get_tensor(name)

    return read


def together(root: Path, kind: str, key: dict[str, Any], build: Callable[[Path], None]) -> Path:
    """Return ``cached_folder``, where all processes of the run build if the first one finds that it must.

    The others do their part of the work and keep nothing of it.
    """
    if distributed.rank():
        if distributed.told(False):
            with TemporaryDirectory() as scratch:
                build(Path(scratch))
        return distributed.told(Path())
    announced = False

    def led(folder: Path) -> None:
        nonlocal announced
        announced = distributed.told(True)
        build(folder)

    found = cached_folder(root, kind, key, led)
    if not announced:
        distributed.told(False)
    return distributed.told(found)


@dataclass
class _Workshop:
    """Builds the artefacts of one run, each cached under the content it was made from."""

    run: Run
    begin: Start
    model: Any
    chat: ChatFormat
    held: References
    say: Say

    def ids(self, rows: Sequence[PromptRow]) -> list[list[int]]:
        """Return prompts as token ids, up to where the answer starts."""
        return [self.chat.prompt_ids(row.prompt) for row in rows]

    def cached(self, recipe: Recipe, build: Callable[[Path], None], **inputs: Any) -> Path:
        """Return the folder of an artefact of this start model and other inputs."""
        key = recipe.key(model=self.begin.folder.content, dtype=str(self.model.dtype), **inputs)
        return together(Path(self.run.cache_root), recipe.kind, key, build)

    def subspace(self, spec: SubspaceSpec) -> Path:
        """Return the folder with the bases of the weight constraint."""
        prompts = self.held.harmful_ids + (self.held.benign_ids if spec.held_on == "both" else [])

        def build(folder: Path) -> None:
            self.say(f"building the safety subspace: {spec.modules}, {len(prompts)} reference prompts")
            basis.build(self.model, prompts, spec, self.chat.pad_id, folder)

        return self.cached(artefact.SUBSPACE, build, prompts=digest(prompts), spec=asdict(spec))

    def texts(self) -> list[Sequence[int]]:
        """Return what an autoencoder is trained on: refused harmful prompts and benign text, at the set shares."""
        run, pools = self.run, self.begin.pools
        harmful: list[Sequence[int]] = list(self.held.refusals)
        benign: list[Sequence[int]] = [*self.ids(self.held.benign), *self.ids(pools.get("harmless", "alignment"))]
        rows = pools.task_rows(run.data, run.task).train[: run.data.n_train]
        benign += [self.chat.encode(row.prompt, row.response).input_ids for row in rows]
        return activations.blend(harmful, benign, run.sae.n_tokens, run.sae.harmful_share, run.sae.seed)

    def autoencoder(self, layer: int) -> Path:
        """Return the folder of the autoencoder of a layer's output."""
        config, pad_id, texts = self.run.sae, self.chat.pad_id, self.texts()

        def build(folder: Path) -> None:
            data, held_out = activations.split(texts, config.held_out, config.seed)
            x = activations.collect(self.model, layer, data, pad_id)
            y = activations.collect(self.model, layer, held_out, pad_id, unlike=data)
            if distributed.rank():  # the rest is work for one
                return
            self.say(f"training the autoencoder: layer {layer}, {len(x)} activations, {config.n_latents} latents")
            facts = {"n_train": len(x), "copies_share": activations.copies(data)}
            sae_train.train(x, y, config, f"model.layers.{layer}", folder, facts)

        made_of = {"layer": layer, "texts": digest(texts), "settings": asdict(config)}
        return self.cached(artefact.AUTOENCODER, build, **made_of, library=importlib.metadata.version("sae-lens"))

    def autoencoders(self, spec: FeatureSpec) -> dict[int, Path]:
        """Return the folders of the autoencoders of all hooked layers."""
        n_layers = len(decoder_layers(self.model))
        layers = sorted({depth_to_layer(depth, n_layers) for depth in spec.depths})
        return {layer: self.autoencoder(layer) for layer in layers}

    def features(self, spec: FeatureSpec) -> Path:
        """Return the folder with encoders and chosen latents of all hooked layers."""
        autoencoders = self.autoencoders(spec)
        openings = self.openings() if spec.selection == "attribution" else []

        def build(folder: Path) -> None:
            for layer, path in autoencoders.items() if distributed.rank() == 0 else ():
                self.say(f"choosing {spec.n_latents} safety latents: layer {layer}, {spec.selection}")
                self._choose(spec, layer, path, openings, folder)

        return self.cached(
            artefact.LATENTS,
            build,
            autoencoders={str(layer): path.name for layer, path in autoencoders.items()},
            prompts=digest([self.ids(self.held.harmful), self.ids(self.held.benign)]),
            openings=openings,
            spec=asdict(spec),
        )

    def openings(self) -> list[int]:
        """Return the tokens that refusals begin with."""
        at = len(self.chat.prompt_ids(""))
        return sorted({self.chat.encode("", text).input_ids[at] for text in REFUSALS})

    def _choose(self, spec: FeatureSpec, layer: int, autoencoder: Path, openings: Sequence[int], folder: Path) -> None:
        model, pad_id = self.model, self.chat.pad_id
        harmful, benign = self.ids(self.held.harmful), self.ids(self.held.benign)
        encoder = sae_train.encoder(autoencoder)
        x = latents.residuals(model, layer, harmful, spec, pad_id)
        y = latents.residuals(model, layer, benign, spec, pad_id)
        attributed = None
        if spec.selection == "attribution":
            directions = sae_train.decoder_directions(autoencoder)
            attributed = latents.attribution(model, layer, harmful, spec, pad_id, openings, encoder, directions)
        on_harmful, on_benign = latents.topk_codes(x, *encoder), latents.topk_codes(y, *encoder)
        scores = latents.score(spec.selection, on_harmful, on_benign, attributed, self.run.sae.seed)
        chosen = scores.topk(spec.n_latents).indices
        positions = torch.cat([x, y]) if spec.held_on == "both" else x
        if len(positions) < 2:
            raise QualityError(f"{len(positions)} reference positions to hold latents at; accepted: >= 2")
        pre = positions @ encoder[0][:, chosen] + encoder[1][chosen]
        scale = pre.std(0).clamp_min(1e-3 * float(pre.std()))
        facts = {
            "scores": {int(i): round(float(scores[i]), 4) for i in chosen},
            "positions": {"harmful": len(x), "benign": len(y)},
            "quality": read_json(autoencoder / sae_train.REPORT),
        }
        latents.export(folder, layer, encoder, chosen, scores, scale, facts, latents.signature(model, layer))


def autoencoders(run: Run, begin: Start, model: Any, chat: ChatFormat, say: Say) -> dict[int, Path]:
    """Return, by layer that the run's defence hooks, the folder of its autoencoder; none where it hooks no layer."""
    spec = run.constraint.requirements.features
    if spec is None:
        return {}
    held = references(run, begin.pools, begin.folder.content, model, chat, say)
    return _Workshop(run, begin, model, chat, held, say).autoencoders(spec)


def artefacts(run: Run, begin: Start, model: Any, chat: ChatFormat, say: Say) -> tuple[Context, dict[str, Any]]:
    """Build or load all that the run's defence needs.

    Returns:
        The context for ``Defense.prepare``, and JSON-able facts (folders' names, reports) for the run record.

    Raises:
        QualityError: If the start model refuses no reference prompt, or an autoencoder is too poor.
    """
    context = Context(
        model=model,
        seed=run.seed,
        chat=chat,
        start_weight=start_weights(begin.folder.path),
        autocast=run.trainer.autocast,
    )
    needs = run.constraint.requirements
    facts: dict[str, Any] = {}
    if needs.base_weights:
        before = base(run, begin)
        context = replace(context, base_weight=start_weights(before.path))
        facts["base"] = before.content
    if not needs.reference_prompts:
        return context, facts
    held = references(run, begin.pools, begin.folder.content, model, chat, say)
    shop = _Workshop(run, begin, model, chat, held, say)
    context = replace(context, reference=held.harmful_ids, benign=held.benign_ids)
    refusals = [TrainRow(row.id, row.prompt, refusal(row), harmful=False) for row in held.harmful]
    context = replace(context, refusals=refusals)
    facts["reference"] = {"asked": held.asked, "kept": len(held.harmful), "benign": len(held.benign)}
    if held.forms:
        facts["reference"]["forms"] = held.forms
    if needs.subspace is not None:
        folder = shop.subspace(needs.subspace)
        context = replace(context, subspace=basis.load(folder))
        facts["subspace"] = {"folder": folder.name}
    if needs.features is not None:
        folder = shop.features(needs.features)
        context = replace(context, features=latents.load(folder))
        with reading(folder):
            reports = {path.stem: read_json(path) for path in sorted(folder.glob("layer*.json"))}
        facts["features"] = {"folder": folder.name, **reports}
    return context, facts
