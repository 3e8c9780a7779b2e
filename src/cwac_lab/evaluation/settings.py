"""The ``evaluation`` group of the configuration."""

from __future__ import annotations

from dataclasses import dataclass, field

from cwac_lab import judges
from cwac_lab.core.errors import ConfigError, in_range, one_of
from cwac_lab.evaluation import engines
from cwac_lab.judges.endpoint import EndpointConfig


@dataclass
class EvaluationConfig:
    """Settings of evaluation.

    Attributes:
        split: ``test``, or ``validation`` for every choice of a setting.
        batch_size: Prompts per batch of generation.
        max_new_tokens: Length of answers to harmful and harmless prompts.
        n_prompts: At most so many prompts of each kind (harmful, harmless, look-alike); all by default.
        engine: Who generates: ``hf`` (transformers) or ``vllm``.
        judges: Who judges answers; rates are those of the first, the others' stand beside them with their agreement.
        endpoint: Settings of the judge ``endpoint``.
    """

    split: str = "test"
    batch_size: int = 64
    max_new_tokens: int = 48
    n_prompts: int | None = None
    engine: str = "hf"
    judges: list[str] = field(default_factory=lambda: ["refusal", "classifier"])
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)

    def __post_init__(self) -> None:
        """Check the fields."""
        one_of("split", self.split, ("test", "validation"))
        one_of("engine", self.engine, engines.ENGINES)
        if not self.judges or len(set(self.judges)) < len(self.judges):
            raise ConfigError("judges", list(self.judges), f"different ones of {' | '.join(judges.NAMES)}")
        for name in self.judges:
            judges.known(name)
        if judges.ENDPOINT in self.judges:
            self.endpoint.check()
        in_range("batch_size", self.batch_size, 1)
        in_range("max_new_tokens", self.max_new_tokens, 1)
        if self.n_prompts is not None:
            in_range("n_prompts", self.n_prompts, 1)
