"""What an attacker that searches chooses of LoRA."""

import optuna
import pytest
from omegaconf import OmegaConf

from cwac_lab.sweep.search import RANKS, rank


@pytest.mark.parametrize(
    ("tuning", "chosen", "fixed", "has_rank"),
    [
        ("full", "lora", {}, True),
        ("full", "full", {}, False),
        ("full", "qlora", {}, True),
        ("full", "null_space", {}, False),
        ("lora", None, {}, True),  # an experiment's, that no trial chooses
        ("full", None, {"tuning": "lora"}, True),  # the command line's
        ("full", "lora", {"tuning.rank": "8"}, False),
    ],
)
def test_trials_of_lora_choose_a_rank(tuning, chosen, fixed, has_rank):
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    config, ranks = OmegaConf.create({"tuning": {"method": tuning}}), set()
    for _ in range(20):
        trial = study.ask()
        if chosen is not None:
            trial.suggest_categorical("tuning", (chosen,))
        for name, value in fixed.items():
            trial.set_user_attr(name, value)
        rank(config, trial)
        study.tell(trial, 0.0)
        ranks.add(trial.params.get("tuning.rank"))
    assert ranks == (set(RANKS) if has_rank else {None})
