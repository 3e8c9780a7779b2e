"""Make the runs that a table lacks, and the tables: ``python -m cwac_lab.tables exp=ablation seeds=3``.

``compare=[weight,coupled]`` compares two methods on the same prompts and seeds instead, ``worst=3`` tells what an
adaptive attacker found.
"""

from __future__ import annotations

import sys
from pathlib import Path

from omegaconf import DictConfig

from cwac_lab.core import cli


def main(config: DictConfig) -> None:
    """Write a table an experiment, or one of all recorded runs, under ``output_root/tables``, and its figures."""
    from cwac_lab.core.errors import ConfigError
    from cwac_lab.core.outputs import writable
    from cwac_lab.report import layout, versus, worst

    root = Path(config.output_root)
    n_worst, asked, shape = worst.read(config), versus.read(config), layout.read(config)
    writable("output_root", root)
    if n_worst is not None:
        worst.write(root, n_worst)
        return
    if asked is not None:
        versus.write(root, asked)
        return
    if config.exp is None:
        from cwac_lab.report.files import write
        from cwac_lab.report.views import views
        from cwac_lab.results import select
        from cwac_lab.results.store import runs

        for name, query in views(config.views).items():
            found = list(runs(root)) if query is None else select(root, f"views: {name}", query)
            print(write(root, name, found, layout=shape))
        return
    if config.views is not None:
        raise ConfigError("views", config.views, "null with exp, whose grids say what their tables hold")
    from cwac_lab.report.console import Screen
    from cwac_lab.sweep.experiments import chosen, make

    if make(chosen(config), root, config, Screen(), shape):
        sys.exit(1)


if __name__ == "__main__":
    cli.launch(main, "tables")
