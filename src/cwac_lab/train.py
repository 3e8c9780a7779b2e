"""Fine-tune under a constraint and write the record.

``python -m cwac_lab.train model=qwen constraint=coupled harmful_ratio=0.2``
"""

from __future__ import annotations

import math

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from cwac_lab.core import cli


def main(config: DictConfig) -> float:
    """Check the configuration, then run it; returns what a search is told (NaN where nothing came out).

    Raises:
        ConfigError: If it is a trial of a search that could not be used, or would see the test split.
        LabError: If another process is on a trial of a search.
    """
    from cwac_lab.config.run import read
    from cwac_lab.sweep import search

    run = read(config)
    search.check(run, HydraConfig.get().sweeper)
    # What is read next takes seconds, which a mistake above need not wait for.
    from cwac_lab.core import distributed
    from cwac_lab.core.errors import LabError
    from cwac_lab.evaluation.objectives import objective
    from cwac_lab.report.console import Screen
    from cwac_lab.results.store import METRICS
    from cwac_lab.run.execution import carry_out

    if run.dry:
        from cwac_lab.run.estimate import tell

        tell(run, Screen().say)
        return math.nan
    folder = carry_out(
        run, [*cli.search_path(), *HydraConfig.get().overrides.task], Screen(quiet=distributed.number() > 0)
    )
    if folder.status == "ok":
        return objective(run.objective, folder.read(METRICS))
    if search.searched(HydraConfig.get().sweeper) and not distributed.launched():
        raise LabError(f"{folder.path}: another process is on this trial; search again when it is finished")
    return math.nan


if __name__ == "__main__":
    cli.launch(main)
