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
        words_rates: Ask harmful prompts once more behind words that many rows to train on begin with, where there are
            any, and show their rates as well.
        engine: Who generates: ``hf`` (transformers) or ``vllm``.
        judges: Who judges answers; rates are those of the first, the others' stand beside them with their agreement.
        endpoint: Settings of the judge ``endpoint``.
        every_n_steps: Ask the first harmful prompts every so many optimizer steps while the model is trained; 0 means
            not. It changes nothing that is trained.
        watched: How many harmful prompts that are.
        perplexity: Whether the perplexity on plain text is measured, of the start too: what is forgotten of language.
            On the project's own text, 6,757 tokens, a model of 135M takes 27 s of one core, and as much once for its
            start.
        plain_text: The text: a ``.txt`` file with documents between blank lines, or a file of rows with a column
            ``text``; null is the project's own, which nothing is trained on.
        lm_eval: Tasks of lm-evaluation-harness, groups and tags included, that the model is asked in the end, through
            its chat template. Needs ``pip install 'cwac-lab[lm-eval]'``.
        lm_eval_limit: At most so many documents of each task; null: all.
        lm_eval_tasks: Folder with tasks of your own, as the harness describes them in YAML.
    """

    split: str = "test"
    batch_size: int = 64
    max_new_tokens: int = 48
    n_prompts: int | None = None
    words_rates: bool = True
    engine: str = "hf"
    judges: list[str] = field(default_factory=lambda: ["refusal", "classifier"])
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    every_n_steps: int = 0
    watched: int = 16
    perplexity: bool = False
    plain_text: str | None = None
    lm_eval: list[str] = field(default_factory=list)
    lm_eval_limit: int | None = None
    lm_eval_tasks: str | None = None

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
        in_range("every_n_steps", self.every_n_steps, 0)
        in_range("watched", self.watched, 1)
        for name in ("n_prompts", "lm_eval_limit"):
            if (most := getattr(self, name)) is not None:
                in_range(name, most, 1)
        if len(set(self.lm_eval)) < len(self.lm_eval):
            raise ConfigError("lm_eval", list(self.lm_eval), "different tasks")
