"""Find the weights a configuration names, say plainly what they are, and load them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from cwac_lab.core import recipes
from cwac_lab.core.cache import cached_folder, digest, file_digest
from cwac_lab.core.errors import ConfigError, LabError, MissingAsset
from cwac_lab.models import architecture, lora
from cwac_lab.models import folder as folders
from cwac_lab.models.answers import logits_of
from cwac_lab.models.architecture import Use
from cwac_lab.models.chat import ChatFormat
from cwac_lab.models.classes import auto_classes
from cwac_lab.models.context import check_context
from cwac_lab.models.origin import Origin, origin
from cwac_lab.models.origin import merged as with_adapter
from cwac_lab.models.packaged import PACKAGES, installed_folder
from cwac_lab.models.prefix import MIN_SHARED, states_after
from cwac_lab.models.settings import ModelConfig as ModelConfig
from cwac_lab.models.settings import Weights as Weights
from cwac_lab.models.settings import before_alignment
from cwac_lab.models.settings import choose_weights as choose_weights
from cwac_lab.models.sites import FAMILIES
from cwac_lab.models.sources import Source

_WRITER = "transformers_version"
ARCHITECTURE_NAMES = {"llama": "Llama", "qwen2": "Qwen2", "mistral": "Mistral", "gemma3_text": "Gemma 3"}


@dataclass(frozen=True)
class ModelFolder:
    """A transformers folder on disk, what it holds in words, and an identity of its content."""

    path: Path
    description: str
    content: str
    origin: Origin = field(default_factory=Origin)


def content_digest(folder: Path) -> str:
    """Return the SHA-256 over config, tokenizer and weights of a model folder.

    The version of transformers that wrote the config does not count: it changes nothing of the model.

    Raises:
        MissingAsset: If there are no safetensors files (pickled weights are never loaded), or not all of them.
    """
    files = [*folders.weight_files(folder), *folders.identity_files(folder)]
    config = {key: value for key, value in folders.read(folder, folders.CONFIG).items() if key != _WRITER}
    return digest([config, file_digest(file for file in files if file.name != folders.CONFIG)])


def examine(folder: Path, use: Use, *, weights: bool = True, words: Path | None = None) -> None:
    """Check that a folder holds a model that can be used so; no weights are loaded, nothing of it is run.

    Args:
        folder: The model folder.
        use: What is done with the model.
        weights: Whether the weights are there yet.
        words: The folder with its tokenizer, where that is another one.

    Raises:
        LabError: One line that names file or setting, what is wrong with it, and what is accepted.
    """
    words = words or folder
    files = (file for each in (folder, words) for file in sorted(each.iterdir()) if file.is_file())
    stamp = tuple((file.name, (found := file.stat()).st_size, found.st_mtime_ns, found.st_ino) for file in files)
    _examined(folder, use, weights, words, stamp)


@lru_cache(maxsize=64)
def _examined(folder: Path, use: Use, weights: bool, words: Path, _: object) -> None:
    folders.check_files(folder)
    if weights:
        folders.headers(folders.weight_files(folder))
    model = folders.skeleton(folder)
    architecture.check(model, use)
    if use.max_length is not None:
        check_context(folder, use.max_length)
        _check_tokens(words, model, load_chat(words, use.max_length, use.chat_template))
    if weights:
        architecture.check_stored(model, use, folders.check_weights(folder, model))


def _check_tokens(folder: Path, model: Any, chat: ChatFormat) -> None:
    """Check that a tokenizer's ids have embeddings.

    Special tokens that no rendered text has need none (Gemma's text-only models have one for images).

    Raises:
        MissingAsset: If one that can occur has none.
    """
    held = len(model.get_input_embeddings().weight)
    special = {id for id, token in chat.tokenizer.added_tokens_decoder.items() if token.special}
    used = {*chat.encode("question", "answer").input_ids, *chat.prompt_ids("question"), chat.pad_id, chat.end_id}
    past = {id: token for token, id in chat.tokenizer.get_vocab().items() if id >= held}
    past = {id: token for id, token in past.items() if id in used or id not in special}
    if past:
        highest = max(past)
        raise MissingAsset(
            f"{folder}: the tokenizer has {past[highest]!r} as id {highest}, the model {held} embeddings (ids below "
            f"{held}); accepted: embeddings for all tokens (model.resize_token_embeddings(len(tokenizer)), then train)"
        )


def find_base(config: ModelConfig, profile: str) -> ModelFolder:
    """Return the folder of the model before alignment, for a model that was aligned elsewhere.

    Raises:
        ConfigError: If the configuration names none.
        MissingAsset: If the hub does not give it.
    """
    return _whole(before_alignment(config, profile), config.name, Use())


def _whole(source: Source, model: str, use: Use, words: Path | None = None) -> ModelFolder:
    """Return the folder of a model, fetched where it is of the hub, and examined before and after its weights are."""
    if source.folder is None:
        examine(source.small(), use, weights=False, words=words)
    folder = source.whole()
    examine(folder, use, words=words)
    # The snapshot folder is named by its commit, which identifies the content without reading it.
    content = f"{source.name}@{folder.name}" if source.folder is None else content_digest(folder)
    repository = source.name if source.folder is None else None
    return ModelFolder(folder, f"{model}: {source.words}", content, origin(folder, repository))


def _adapter(config: ModelConfig) -> tuple[Source | None, Source | None]:
    """Return where the adapter of a model given by path is, and the base that is set; what of the hub is not fetched.

    Raises:
        ConfigError: If both settings name an adapter.
    """
    path, adapter = config.sources()
    if path is None or path.folder is None or not folders.holds_adapter(path.folder):
        return adapter, path
    if adapter is not None:
        raise ConfigError("model.path", config.path, f"the base of model.adapter={config.adapter}, not an adapter too")
    return path, None


def examine_here(config: ModelConfig, use: Use) -> None:
    """Examine of a model given by path what is on this machine; nothing is fetched.

    Raises:
        LabError: As ``examine``, and if an adapter is of another kind or another model.
    """
    adapter, base = _adapter(config)
    if adapter is None and base is not None and base.folder is not None:
        examine(base.folder, use)
    if adapter is None or adapter.folder is None:
        return
    held = lora.settings(adapter.folder)
    lora.factors(adapter.folder)
    base = base or lora.base_of(adapter, held)
    if base.folder is not None:
        _examine_merged(adapter.folder, base.folder, use, weights=True)


def _examine_merged(adapter: Path, base: Path, use: Use, *, weights: bool) -> Path:
    """Examine an adapter and its base; returns the folder with the tokenizer, the adapter's where it has one."""
    words = adapter if folders.has_vocabulary(adapter) else base
    examine(base, use, weights=weights, words=words)
    lora.check(folders.skeleton(base), adapter)
    return words


def _given(config: ModelConfig, cache_root: Path, use: Use) -> ModelFolder:
    """Return the folder of a model given by path, with its adapter merged where there is one."""
    adapter, base = _adapter(config)
    if adapter is None:
        assert base is not None
        if base.folder is not None or not folders.holds_adapter(base.small()):
            return _whole(base, config.name, use)
        adapter, base = base, None
    held = lora.settings(adapter.small())
    base, folder = base or lora.base_of(adapter, held), adapter.whole()
    words = _examine_merged(folder, base.small(), use, weights=False)
    start = _whole(base, config.name, use, words)
    words = folder if words == folder else start.path

    def build(target: Path) -> None:
        model = load_model(start.path)
        lora.add(model, folder, by_rank=False)
        model.save_pretrained(target)
        folders.copy_words(words, target)

    made_of = {"base": start.content, "adapter": lora.digest(folder), "words": folders.words_digest(words)}
    key = recipes.MERGED.key(**made_of)
    merged = cached_folder(cache_root, recipes.MERGED.kind, key, build)
    told = f"{config.name}: adapter {adapter.words} merged into {base.words}"
    own = origin(folder, adapter.name if adapter.folder is None else None)
    return ModelFolder(merged, told, digest(key), with_adapter(start.origin, own))


def find(config: ModelConfig, profile: str, cache_root: Path, use: Use | None = None) -> ModelFolder:
    """Return the folder with the start weights of a model, converted or downloaded where needed, and examined.

    Raises:
        ConfigError: If the configuration names no usable weights.
        MissingAsset: If a package is not installed or the hub does not give a model.
        LabError: If what is found cannot be used so.
    """
    use = use or Use()
    weights = choose_weights(config, profile)
    if weights is None:
        return _given(config, cache_root, use)
    if weights.hub is not None:
        source = Source(f"model.weights.{profile}.hub", weights.hub, None, weights.revision, "choose profile=embedded")
        return _whole(source, config.name, use)
    assert weights.package is not None
    package = PACKAGES[weights.package]
    kind = weights.architecture or package.architecture
    folder = installed_folder(weights.package, kind, cache_root)
    examine(folder, use)
    words = f"{config.name}: {ARCHITECTURE_NAMES[kind]} architecture, {package.title} weights"
    return ModelFolder(folder, words, content_digest(folder), package.origin)


def load_model(folder: Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Any:
    """Load a causal language model from a folder (safetensors only, no remote code), in evaluation mode.

    Raises:
        LabError: If the folder's weights are not those of its architecture, or this is not computed as expected here.
    """
    folders.check_files(folder)
    folders.headers(folders.weight_files(folder))
    models, _ = auto_classes()
    model, matched = models.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, local_files_only=True, trust_remote_code=False,
        ignore_mismatched_sizes=True, output_loading_info=True,
    )  # fmt: skip
    folders.check_matched(folder, type(model).__name__, matched)
    model = model.to(device).eval()
    _check_logits(model)
    return model


@torch.inference_mode()
def _check_logits(model: Any) -> None:
    """Check that logits as this package computes them, states and head apart and openings cached, are the model's own.

    Some architectures scale or change what the head gives, or keep more than keys and values of an opening.

    Raises:
        LabError: If they are not.
    """
    ids = torch.arange(MIN_SHARED + 1, device=model.device)[None] + 1
    mask = torch.ones_like(ids)
    try:
        wanted = model(input_ids=ids, attention_mask=mask).logits[:, -1].float()
        found = logits_of(model, states_after(model, ids, mask, MIN_SHARED))[:, -1].float()
    except (AttributeError, IndexError, NotImplementedError, TypeError, ValueError) as error:
        raise LabError(f"{type(model).__name__} cannot be run as {FAMILIES} are: {folders.reason(error)}") from error
    off = float((found - wanted).norm() / wanted.norm())
    # In few bits a cached opening differs by rounding; what is meant here is another formula.
    if not off <= (0.01 if model.dtype == torch.float32 else 0.25):
        what = "its weights give no finite logits" if not wanted.isfinite().all() else f"logits are off by {off:.0%}"
        raise LabError(
            f"{type(model).__name__} ({model.config.model_type}): computed as {FAMILIES} are, {what}; "
            "accepted: finite weights of an architecture whose head reads the last states as they are"
        )


@lru_cache(maxsize=8)
def load_chat(folder: Path, max_length: int, chat_template: str | None = None) -> ChatFormat:
    """Load the tokenizer of a folder as a chat format; runs of one process share it.

    Raises:
        MissingAsset: If there is no tokenizer, or neither it nor the configuration has a chat template.
        ConfigError: If the template is of no use, or the model takes in fewer tokens than ``max_length``.
    """
    check_context(folder, max_length)
    if not folders.has_vocabulary(folder):
        raise MissingAsset(f"no tokenizer in {folder}; accepted: tokenizer.json (tokenizer.save_pretrained writes it)")
    try:
        tokenizer = auto_classes()[1].from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise MissingAsset(f"the tokenizer in {folder} cannot be read: {folders.reason(error)}") from error
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    if not tokenizer.chat_template:
        raise MissingAsset(f"the tokenizer in {folder.name} has no chat template: set model.chat_template")
    return ChatFormat(tokenizer, max_length)
