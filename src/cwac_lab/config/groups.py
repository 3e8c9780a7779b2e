"""Groups of the configuration that are settings only: profile, alignment, diagnostics."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass

from cwac_lab.core.errors import ConfigError, in_range, one_of


@dataclass
class ProfileConfig:
    """The ``profile`` group: which weights are used; its YAML also overlays other groups.

    Attributes:
        name: Which of a model's weights are used: packaged ones on a CPU, small ones of the hub, or the paper's.
    """

    name: str = "embedded"

    def __post_init__(self) -> None:
        """Check the fields."""
        one_of("name", self.name, ("embedded", "small", "paper"))


@dataclass
class AlignConfig:
    """Settings of the alignment stage: LoRA in all linear layers, merged.

    Attributes:
        rebuild: Train the packaged weights' start anew, instead of taking the shipped one.
        export: Folder that ``python -m cwac_lab.align`` writes the adapter of the start and its recipe to.
        epochs: Passes over refusals and own answers.
        learning_rate: Peak of AdamW's; linear warm-up and decay.
        batch_size: Rows per step.
        answer_tokens: Length of the model's own answers to harmless prompts.
        rank: Rank of the factors.
        alpha: Numerator of their scale, alpha / rank.
        kept: Share of the trained update that is kept (WiSE-FT, Wortsman et al. 2022): less refuses less.
    """

    rebuild: bool = False
    export: str | None = None
    epochs: int = 2
    learning_rate: float = 1e-3
    batch_size: int = 8
    answer_tokens: int = 16
    rank: int = 16
    alpha: float = 32.0
    kept: float = 0.85

    def __post_init__(self) -> None:
        """Check the fields."""
        in_range("kept", self.kept, 0, 1, open_low=True)
        one_of("rebuild", self.rebuild, (True, False))
        for key in ("epochs", "batch_size", "answer_tokens", "rank"):
            in_range(key, getattr(self, key), 1)
        for key in ("learning_rate", "alpha"):
            in_range(key, getattr(self, key), 0, open_low=True)

    @property
    def recipe(self) -> dict[str, float]:
        """What makes the start, without where it is put."""
        return {name: value for name, value in asdict(self).items() if name not in ("rebuild", "export")}


@dataclass
class ExportConfig:
    """Where a saved model goes beside the run's folder.

    Attributes:
        push: Repository of the hub, ORG/NAME, that it is uploaded to; null: none.
        private: Whether that repository is private, where it is made anew.
    """

    push: str | None = None
    private: bool = True

    def __post_init__(self) -> None:
        """Check the fields."""
        one_of("private", self.private, (True, False))
        if self.push is not None and not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", self.push):
            raise ConfigError("push", self.push, "a repository of the hub, ORG/NAME")


@dataclass
class DiagnosticsConfig:
    """Settings of the measurement of drift within a run; it changes nothing that the run computes.

    Attributes:
        enabled: Measure after fine-tuning, on prompts of the split that is evaluated on.
        every_n_steps: Measure during fine-tuning too, every so many optimizer steps; 0 means not.
        n_prompts: At most so many harmful and harmless prompts each.
    """

    enabled: bool = False
    every_n_steps: int = 0
    n_prompts: int = 32

    def __post_init__(self) -> None:
        """Check the fields."""
        in_range("every_n_steps", self.every_n_steps, 0)
        in_range("n_prompts", self.n_prompts, 2)
