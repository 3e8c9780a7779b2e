"""Find the weights a configuration names, say plainly what they are, and load them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from cwac_lab.cache import file_digest
from cwac_lab.errors import ConfigError, MissingAsset, one_of
from cwac_lab.models.chat import ChatFormat
from cwac_lab.models.context import check_context
from cwac_lab.models.packaged import PACKAGES, auto_classes, installed_folder
from cwac_lab.models.templates import check_template

_IDENTITY = ("config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja")
ARCHITECTURE_NAMES = {"llama": "Llama", "qwen2": "Qwen2", "mistral": "Mistral", "gemma3_text": "Gemma 3"}


@dataclass
class Weights:
    """Where weights come from in one profile: a package of the Python index, or a hub repository.

    ``base`` is the hub repository of the same model before its alignment, which some baselines need.
    """

    package: str | None = None
    architecture: str | None = None
    hub: str | None = None
    revision: str = "main"
    base: str | None = None


@dataclass
class ModelConfig:
    """The ``model`` group."""

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
        if not (Path(config.path) / "config.json").is_file():
            raise ConfigError("model.path", config.path, "a folder with config.json, tokenizer and safetensors")
        return None
    weights = config.weights.get(profile)
    if weights is None or (weights.package is None and weights.hub is None):
        known = [name for name, entry in config.weights.items() if entry is not None]
        raise ConfigError("profile", profile, f"for model={config.name}: {' | '.join(known)}, or model.path=FOLDER")
    if weights.package is not None and weights.package not in PACKAGES:
        raise ConfigError(f"model.weights.{profile}.package", weights.package, " | ".join(PACKAGES))
    return weights


def content_digest(folder: Path) -> str:
    """Return the SHA-256 over config, tokenizer and safetensors files of a model folder.

    Raises:
        MissingAsset: If there is no safetensors file (pickled weights are never loaded).
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise MissingAsset(f"no *.safetensors in {folder}: pickled weights are not loaded; convert them first")
    return file_digest([*files, *(folder / name for name in _IDENTITY if (folder / name).is_file())])


def find_base(config: ModelConfig, profile: str) -> ModelFolder:
    """Return the folder of the model before alignment, for a model that was aligned elsewhere.

    Raises:
        ConfigError: If the configuration names none.
        MissingAsset: If the hub cannot be reached.
    """
    weights = config.weights.get(profile)
    if weights is None or weights.base is None:
        raise ConfigError(f"model.weights.{profile}.base", None, "the hub repository of the model before alignment")
    return _from_hub(Weights(hub=weights.base), config.name, profile)


def _from_hub(weights: Weights, model: str, profile: str) -> ModelFolder:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    assert weights.hub is not None
    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        folder = Path(snapshot_download(weights.hub, revision=weights.revision, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise MissingAsset(
            f"model={model} profile={profile}: cannot fetch {weights.hub} from the hub ({type(error).__name__}); "
            "log in or connect, set model.path=FOLDER, or choose profile=embedded"
        ) from error
    # The snapshot folder is named by its commit, which identifies the content without reading it.
    return ModelFolder(folder, f"{model}: {weights.hub}", f"{weights.hub}@{folder.name}")


def find(config: ModelConfig, profile: str, cache_root: Path) -> ModelFolder:
    """Return the folder with the start weights of a model, converted or downloaded where needed.

    Raises:
        ConfigError: If the configuration names no usable weights.
        MissingAsset: If a package is not installed or the hub cannot be reached.
    """
    weights = choose_weights(config, profile)
    if weights is None:
        assert config.path is not None
        folder = Path(config.path).resolve()
        return ModelFolder(folder, f"{config.name}: local folder {folder.name}", content_digest(folder))
    if weights.hub is not None:
        return _from_hub(weights, config.name, profile)
    assert weights.package is not None
    package = PACKAGES[weights.package]
    architecture = weights.architecture or package.architecture
    folder = installed_folder(weights.package, architecture, cache_root)
    words = f"{config.name}: {ARCHITECTURE_NAMES[architecture]} architecture, {package.title} weights"
    return ModelFolder(folder, words, content_digest(folder))


def load_model(folder: Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Any:
    """Load a causal language model from a folder (safetensors only, no remote code), in evaluation mode."""
    models, _ = auto_classes()
    model = models.from_pretrained(folder, dtype=dtype, use_safetensors=True, local_files_only=True)
    return model.to(device).eval()


@lru_cache(maxsize=8)
def load_chat(folder: Path, max_length: int, chat_template: str | None = None) -> ChatFormat:
    """Load the tokenizer of a folder as a chat format; runs of one process share it.

    Raises:
        MissingAsset: If neither the tokenizer nor the configuration has a chat template.
        ConfigError: If the template is of no use, or the model takes in fewer tokens than ``max_length``.
    """
    check_context(folder, max_length)
    tokenizer = auto_classes()[1].from_pretrained(folder, local_files_only=True)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    if not tokenizer.chat_template:
        raise MissingAsset(f"the tokenizer in {folder.name} has no chat template: set model.chat_template")
    return ChatFormat(tokenizer, max_length)
