"""The ``model`` group, and which weights it names."""

from __future__ import annotations

from dataclasses import dataclass, field

from cwac_lab.core.errors import ConfigError, one_of
from cwac_lab.models.folder import ADAPTERS
from cwac_lab.models.packaged import PACKAGES
from cwac_lab.models.sources import Source, source
from cwac_lab.models.templates import check_template


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
        name: Name of the model in tables; of a model given by path the last part of the path or id.
        path: Model of your own, in the place of ``weights``: a folder in the format of transformers with weights in
            safetensors, or ``ORG/NAME`` of the hub; either may hold a LoRA adapter of PEFT.
        revision: Commit, branch or tag of a ``path`` of the hub; null: main.
        adapter: LoRA adapter of PEFT that is merged into the start, a folder or ``ORG/NAME`` of the hub; its base is
            ``path``, or else the one that it names itself.
        base: The same model before its alignment, for a model given by path, which some baselines need: a folder or
            ``ORG/NAME`` of the hub.
        chat_template: Chat template that takes the place of the tokenizer's.
        align: ``refusals``: the model is first taught to refuse; ``none``: it is fine-tuned as it is, the default of a
            model given by path.
        weights: Where the weights are, by profile.
    """

    name: str = "smollm"
    path: str | None = None
    revision: str | None = None
    adapter: str | None = None
    base: str | None = None
    chat_template: str | None = None
    align: str = "refusals"
    weights: dict[str, Weights | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the fields."""
        one_of("align", self.align, ("refusals", "none"))
        check_template("chat_template", self.chat_template, answers=True)
        if self.revision is not None and self.path is None:
            raise ConfigError("revision", self.revision, "null without model.path (model.weights.PROFILE.revision)")

    @property
    def given(self) -> bool:
        """Whether the model is given by path, not by the weights of an option."""
        return self.path is not None or self.adapter is not None

    def sources(self) -> tuple[Source | None, Source | None]:
        """Return where ``path`` and ``adapter`` are.

        Raises:
            ConfigError: If one is neither a folder of its kind nor the name of a repository.
        """
        path = adapter = None
        if self.path is not None:
            path = source("model.path", self.path, self.revision)
        if self.adapter is not None:
            adapter = source("model.adapter", self.adapter, kind=ADAPTERS)
        return path, adapter


def choose_weights(config: ModelConfig, profile: str) -> Weights | None:
    """Return the weights of a profile, or None for a model given by path; checks that need no download.

    Raises:
        ConfigError: If the model has no weights in the profile, or what is given by path is no model.
    """
    if config.given:
        config.sources()
        return None
    weights = config.weights.get(profile)
    if weights is None or (weights.package is None and weights.hub is None):
        known = [name for name, entry in config.weights.items() if entry is not None]
        accepted = f"for model={config.name}: {' | '.join(known)}, or model.path=FOLDER or ORG/NAME"
        raise ConfigError("profile", profile, accepted)
    if weights.package is not None and weights.package not in PACKAGES:
        raise ConfigError(f"model.weights.{profile}.package", weights.package, " | ".join(PACKAGES))
    return weights


def before_alignment(config: ModelConfig, profile: str) -> Source:
    """Return where the model before alignment is, for a model that was aligned elsewhere.

    Raises:
        ConfigError: If the configuration names none.
    """
    if config.given:
        if config.base is None:
            raise ConfigError("model.base", None, "the model before its alignment, a folder or ORG/NAME of the hub")
        return source("model.base", config.base)
    weights, key = config.weights.get(profile), f"model.weights.{profile}.base"
    if weights is None or weights.base is None:
        raise ConfigError(key, None, "the hub repository of the model before alignment")
    return Source(key, weights.base)
