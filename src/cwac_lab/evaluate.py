"""Judge a run's saved answers again, without generating: ``python -m cwac_lab.evaluate run=outputs/runs/NAME``.

With ``against=OTHER_RUN`` a judge at an endpoint says which answers to the task's rows are better.
"""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from cwac_lab.core import cli


def main(config: DictConfig) -> None:
    """Read the run's own configuration, judge, and rewrite verdicts and metrics."""
    from cwac_lab.config.run import read
    from cwac_lab.core.errors import ConfigError
    from cwac_lab.judges import installed
    from cwac_lab.report.console import Screen
    from cwac_lab.results import store

    folder = store.RunFolder(Path(config.run))
    if not folder.has(store.CONFIG):
        raise ConfigError("run", config.run, f"a folder that holds {store.CONFIG}, e.g. one under outputs/runs")
    asked = OmegaConf.create(folder.config())
    if config.judges is not None and config.against is not None:
        raise ConfigError("judges", list(config.judges), "null with against")
    if config.judges is not None:
        asked.evaluation.judges = config.judges
    given = {name: value for name, value in config.endpoint.items() if value is not None}
    asked.evaluation.endpoint = {**asked.evaluation.get("endpoint", {}), **given}
    run = read(asked, recorded=True)
    installed(run.evaluation.judges if config.against is None else ())
    if config.against is not None:
        from cwac_lab.run.preference import prefer

        prefer(run, folder, store.RunFolder(Path(config.against)), Screen())
        return
    from cwac_lab.run.execution import rejudge

    rejudge(run, folder, Screen())


if __name__ == "__main__":
    cli.launch(main, "evaluate")
