"""Fine-tune under a constraint and write the record.

``python -m cwac_lab.train model=qwen constraint=coupled harmful_ratio=0.2``
"""

from __future__ import annotations

from omegaconf import DictConfig

from cwac_lab import cli


def main(config: DictConfig) -> None:
    """Check the configuration, then run it."""
    from cwac_lab.config import read
    from cwac_lab.experiment import execute
    from cwac_lab.results.console import Screen

    execute(read(config), Screen())


if __name__ == "__main__":
    cli.launch(main)
