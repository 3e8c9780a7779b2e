"""Find the weights a configuration names, say plainly what they are, and load them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from cwac_lab.core.cache import digest, file_digest
from cwac_lab.core.errors import ConfigError, LabError, MissingAsset, one_of
from cwac_lab.models import architecture
from cwac_lab.models import folder as folders
from cwac_lab.models.answers import logits_of
from cwac_lab.models.architecture import Use
from cwac_lab.models.chat import ChatFormat
from cwac_lab.models.classes import auto_classes
from cwac_lab.models.context import check_context
from cwac_lab.models.packaged import PACKAGES, installed_folder
from cwac_lab.models.prefix import MIN_SHARED, states_after
from cwac_lab.models.sites import FAMILIES
from cwac_lab.models.templates import check_template

# What the hub is asked for: first what tells whether the weights are worth fetching.
_SMALL = ["*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
_WRITER = "transformers_version"
ARCHITECTURE_NAMES = {"llama": "Llama", "qwen2": "Qwen2", "mistral": "Mistral", "gemma3_text": "Gemma 3"}


@dataclass
class Weights:
    """Where weights come from in one profile: a package of the Python index, or a hub repository.

    Attributes:
        package: Package that holds the weights.
        architecture: Architecture that the packaged weights are run in.
        hub: Repository of the hub.
        revision: Commit, branch or tag of the repository.
        base: Repository of the same model before its alignment, which some baselines need.
    """

    package: str | None = None
    architecture: str | None = None
    hub: str | None = None
    revision: str = "main"
    base: str | None = None


@dataclass
class ModelConfig:
    """The ``model`` group.

    Attributes:
        name: Name of the model in tables.
        path: Folder of your own model, in the format of transformers with weights in safetensors; takes the place of
            ``weights``.
        chat_template: Chat template that takes the place of the tokenizer's.
        align: ``refusals``: the model is first taught to refuse; ``none``: it is fine-tuned as it is.
        weights: Where the weights are, by profile.
    """

    name: str = "smollm"
    path: str | None = None
    chat_template: str | None = None
    align: str = "refusals"
    weights: dict[str, Weights | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the fields."""
        one_of("align", self.align, ("refusals", "none"))
        check_template("chat_template", self.chat_template, answers=True)


@dataclass(frozen=True)
class ModelFolder:
    """A transformers folder on disk, what it holds in words, and an identity of its content."""

    path: Path
    description: str
    content: str


def choose_weights(config: ModelConfig, profile: str) -> Weights | None:
    """Return the weights of a profile, or None for a local path; checks that need no download.

    Raises:
        ConfigError: If the model has no weights in the profile, or the local path is no model folder.
    """
    if config.path is not None:
        folders.named_folder(config.path)
        return None
    weights = config.weights.get(profile)
    if weights is None or (weights.package is None and weights.hub is None):
        known = [name for name, entry in config.weights.items() if entry is not None]
        raise ConfigError("profile", profile, f"for model={config.name}: {' | '.join(known)}, or model.path=FOLDER")
    if weights.package is not None and weights.package not in PACKAGES:
        raise ConfigError(f"model.weights.{profile}.package", weights.package, " | ".join(PACKAGES))
    return weights


def content_digest(folder: Path) -> str:
    """Return the SHA-256 over config, tokenizer and weights of a model folder.

    The version of transformers that wrote the config does not count: it changes nothing of the model.

    Raises:
        MissingAsset: If there are no safetensors files (pickled weights are never loaded), or not all of them.
    """
    files = [*folders.weight_files(folder), *folders.identity_files(folder)]
    config = {key: value for key, value in folders.read(folder, folders.CONFIG).items() if key != _WRITER}
    return digest([config, file_digest(file for file in files if file.name != folders.CONFIG)])


def examine(folder: Path, use: Use, *, weights: bool = True) -> None:
    """Check that a folder holds a model that can be used so; no weights are loaded, nothing of it is run.

    Args:
        folder: The model folder.
        use: What is done with the model.
        weights: Whether the weights are there yet.

    Raises:
        LabError: One line that names file or setting, what is wrong with it, and what is accepted.
    """
    files = (file for file in sorted(folder.iterdir()) if file.is_file())
    stamp = tuple((file.name, (found := file.stat()).st_size, found.st_mtime_ns, found.st_ino) for file in files)
    _examined(folder, use, weights, stamp)


@lru_cache(maxsize=64)
def _examined(folder: Path, use: Use, weights: bool, _: object) -> None:
    folders.check_files(folder)
    if weights:
        folders.headers(folders.weight_files(folder))
    model = folders.skeleton(folder)
    architecture.check(model, use)
    if use.max_length is not None:
        _check_tokens(folder, model, load_chat(folder, use.max_length, use.chat_template))
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
        MissingAsset: If the hub cannot be reached.
    """
    weights = config.weights.get(profile)
    if weights is None or weights.base is None:
        raise ConfigError(f"model.weights.{profile}.base", None, "the hub repository of the model before alignment")
    return _from_hub(Weights(hub=weights.base), config.name, profile, Use())


def _from_hub(weights: Weights, model: str, profile: str, use: Use) -> ModelFolder:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    assert weights.hub is not None

    def fetched(*wanted: str) -> Path:
        return Path(snapshot_download(weights.hub, revision=weights.revision, allow_patterns=list(wanted)))

    try:
        examine(fetched(*_SMALL), use, weights=False)
        folder = fetched(*_SMALL, "*.safetensors")
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise MissingAsset(
            f"model={model} profile={profile}: cannot fetch {weights.hub} from the hub ({type(error).__name__}); "
            "log in or connect, set model.path=FOLDER, or choose profile=embedded"
        ) from error
    examine(folder, use)
    # The snapshot folder is named by its commit, which identifies the content without reading it.
    return ModelFolder(folder, f"{model}: {weights.hub}", f"{weights.hub}@{folder.name}")


def find(config: ModelConfig, profile: str, cache_root: Path, use: Use | None = None) -> ModelFolder:
    """Return the folder with the start weights of a model, converted or downloaded where needed, and examined.

    Raises:
        ConfigError: If the configuration names no usable weights.
        MissingAsset: If a package is not installed or the hub cannot be reached.
        LabError: If what is found cannot be used so.
    """
    use = use or Use()
    weights = choose_weights(config, profile)
    if weights is None:
        assert config.path is not None
        folder = folders.named_folder(config.path).resolve()
        examine(folder, use)
        return ModelFolder(folder, f"{config.name}: local folder {folder.name}", content_digest(folder))
    if weights.hub is not None:
        return _from_hub(weights, config.name, profile, use)
    assert weights.package is not None
    package = PACKAGES[weights.package]
    kind = weights.architecture or package.architecture
    folder = installed_folder(weights.package, kind, cache_root)
    examine(folder, use)
    words = f"{config.name}: {ARCHITECTURE_NAMES[kind]} architecture, {package.title} weights"
    return ModelFolder(folder, words, content_digest(folder))


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
