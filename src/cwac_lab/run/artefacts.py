"""What a defence needs before training: subspace, autoencoder, latents; built on demand, cached by content."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cwac_lab.config.run import Run
from cwac_lab.core import distributed, recipes
from cwac_lab.core.cache import digest, read_json, reading
from cwac_lab.core.errors import ConfigError, QualityError
from cwac_lab.core.recipes import Recipe
from cwac_lab.data.forms import OWN
from cwac_lab.data.mixing import TrainRow
from cwac_lab.data.responses import REFUSALS, refusal
from cwac_lab.data.sources import PromptRow
from cwac_lab.defenses.cwac.null_space import free_share
from cwac_lab.defenses.cwac.sae import activations, latents
from cwac_lab.defenses.cwac.sae import train as sae_train
from cwac_lab.defenses.cwac.sae.latents import FeatureSpec
from cwac_lab.defenses.cwac.subspace import basis
from cwac_lab.defenses.cwac.subspace.spec import SubspaceSpec
from cwac_lab.defenses.cwac.weight import WeightConstraint
from cwac_lab.defenses.interface import Context
from cwac_lab.models.adapters import TARGETS
from cwac_lab.models.chat import ChatFormat
from cwac_lab.models.sites import decoder_layers, depth_to_layer
from cwac_lab.run import protected
from cwac_lab.run.cached import together
from cwac_lab.run.references import References, references
from cwac_lab.run.rows import with_beginnings
from cwac_lab.run.start import Start, base, start_weights

Say = Callable[[str], None]


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
        texts, parts = protected.texts(self.held, spec)

        def build(folder: Path) -> None:
            self.say(f"building the safety subspace: {spec.modules}, {len(texts)} reference prompts")
            basis.build(self.model, texts, parts, spec, self.chat.pad_id, folder)

        made_of = digest([texts, [list(each) for each in parts]])
        return self.cached(recipes.SUBSPACE, build, prompts=made_of, spec=asdict(spec))

    def texts(self) -> list[Sequence[int]]:
        """Return what an autoencoder is trained on: refused harmful prompts and benign text, at the set shares."""
        run, pools = self.run, self.begin.pools
        harmful: list[Sequence[int]] = list(self.held.refusals)
        benign: list[Sequence[int]] = [*self.ids(self.held.benign), *self.ids(pools.get("harmless", "alignment"))]
        rows = pools.task_rows(run.data, run.task).train[: run.data.n_train]
        benign += [self.chat.encode(row.asked, row.response).input_ids for row in rows]
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
        return self.cached(recipes.AUTOENCODER, build, **made_of, library=importlib.metadata.version("sae-lens"))

    def autoencoders(self, spec: FeatureSpec) -> dict[int, Path]:
        """Return the folders of the autoencoders of all hooked layers."""
        n_layers = len(decoder_layers(self.model))
        layers = sorted({depth_to_layer(depth, n_layers) for depth in spec.depths})
        return {layer: self.autoencoder(layer) for layer in layers}

    def features(self, spec: FeatureSpec) -> Path:
        """Return the folder with encoders and chosen latents of all hooked layers."""
        autoencoders = self.autoencoders(spec)
        begins = openings(self.chat) if spec.selection == "attribution" else []

        def build(folder: Path) -> None:
            for layer, path in autoencoders.items() if distributed.rank() == 0 else ():
                self.say(f"choosing {spec.n_latents} safety latents: layer {layer}, {spec.selection}")
                self._choose(spec, layer, path, begins, folder)

        return self.cached(
            recipes.LATENTS,
            build,
            autoencoders={str(layer): path.name for layer, path in autoencoders.items()},
            prompts=digest([self.ids(self.held.harmful), self.ids(self.held.benign)]),
            openings=begins,
            spec=asdict(spec),
        )

    def _choose(self, spec: FeatureSpec, layer: int, autoencoder: Path, begins: Sequence[int], folder: Path) -> None:
        model, pad_id = self.model, self.chat.pad_id
        harmful, benign = self.ids(self.held.harmful), self.ids(self.held.benign)
        encoder = sae_train.encoder(autoencoder)
        x = latents.residuals(model, layer, harmful, spec, pad_id)
        y = latents.residuals(model, layer, benign, spec, pad_id)
        attributed = None
        if spec.selection == "attribution":
            directions = sae_train.decoder_directions(autoencoder)
            attributed = latents.attribution(model, layer, harmful, spec, pad_id, begins, encoder, directions)
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


def openings(chat: ChatFormat) -> list[int]:
    """Return the ids of tokens that refusals begin with."""
    at = len(chat.prompt_ids(""))
    return sorted({chat.encode("", text).input_ids[at] for text in REFUSALS})


def autoencoders(run: Run, begin: Start, model: Any, chat: ChatFormat, say: Say) -> dict[int, Path]:
    """Return, by layer that the run's defence hooks, the folder of its autoencoder; none where it hooks no layer."""
    spec = run.constraint.requirements.features
    if spec is None:
        return {}
    run = with_beginnings(run, begin, model, chat, say)
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
    if not needs.reference_prompts and run.guard.kl is None:
        return context, facts
    run = with_beginnings(run, begin, model, chat, say)
    held = references(run, begin.pools, begin.folder.content, model, chat, say)
    shop = _Workshop(run, begin, model, chat, held, say)
    context = replace(context, reference=held.harmful_ids, benign=held.benign_ids)
    refusals = [TrainRow(row.id, row.prompt, refusal(row), harmful=False) for row in held.harmful]
    context = replace(context, refusals=refusals, own_refusals=held.refusals[: len(held.harmful)])
    facts["reference"] = {"asked": held.asked, "kept": len(held.harmful), "benign": len(held.benign)}
    if held.forms or run.forms.name != OWN:  # also where no words were found to hold refusals behind
        facts["reference"]["forms"] = held.forms
        facts["reference"]["prefixes"] = {name: form.prefix for name, form in run.forms.others.items() if form.prefix}
    if needs.subspace is not None:
        folder = shop.subspace(needs.subspace)
        subspace = basis.load(folder)
        context = replace(context, subspace=subspace)
        unread, experts = basis.unread(subspace)
        if unread and needs.subspace.rank != 0:
            say(f"{unread} of {experts} experts read no token of the reference prompts: they are free")
        if line := protected.surely_free(*protected.texts(held, needs.subspace), needs.subspace, subspace):
            say(line)
        facts["subspace"] = {"folder": folder.name}
    if needs.features is not None:
        folder = shop.features(needs.features)
        context = replace(context, features=latents.load(folder))
        with reading(folder):
            reports = {path.stem: read_json(path) for path in sorted(folder.glob("layer*.json"))}
        facts["features"] = {"folder": folder.name, **reports}
    return context, facts


def check_free(run: Run, context: Context) -> None:
    """Check that a constraint leaves something to train, where nothing else than what it protects is trained.

    Raises:
        ConfigError: If not.
    """
    for name, part in run.constraint.parts.items():
        if not isinstance(part, WeightConstraint) or context.subspace is None:
            continue
        within = run.tuning.adapts and set(TARGETS[run.tuning.modules]) <= set(TARGETS[part.modules])
        alone = part.trainable == "constrained" or within
        if alone and not free_share(context.model, part.modules, context.subspace):
            key = "energy" if part.rank is None else "rank"
            forms = " (fewer forms protect fewer)" if run.forms.others else ""
            accepted = f"a lower one: every direction is protected{forms}"
            raise ConfigError(f"constraint.{name}.{key}", getattr(part, key), accepted)


def described(run: Run, begin: Start, context: Context, facts: dict[str, Any], chat: ChatFormat) -> Iterator[str]:
    """Yield a line on each artefact that ``artefacts`` returned, with its quality."""
    if "reference" in facts:
        held = facts["reference"]
        yield f"reference: {held['kept']} of {held['asked']} harmful prompts, {held['benign']} benign ones"
        for name, kept in held.get("forms", {}).items():
            yield f"in the form {name}: {kept} of {held['asked']} harmful prompts"
    if context.subspace is not None:
        ranks = sorted(span.rank for span in context.subspace.spans.values())
        yield f"subspace {facts['subspace']['folder']}: rank {ranks[0]} to {ranks[-1]} over {len(ranks)} sites"
        spec = run.constraint.requirements.subspace
        share = free_share(context.model, spec.modules, context.subspace) if spec is not None else 1.0
        yield f"free: {share:.1%} of the weights that it protects"
        for name, share in protected.shares(run, begin, context, facts, chat):
            yield f"inputs within the subspace, {name}: {share:.4f}"
    for features in context.features:
        quality = facts["features"][f"layer{features.layer}"]["quality"]
        yield (
            f"autoencoder of layer {features.layer}: {quality['explained_variance']:.2f} of the held-out variance "
            f"explained, L0 {quality['l0']:.0f}, {quality['dead_share']:.0%} dead; "
            f"{len(features.latents)} safety latents chosen"
        )
