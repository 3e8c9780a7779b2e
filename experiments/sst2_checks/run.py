"""A run whose constraint does not hold some reference prompts: ``python run.py near|random OVERRIDES``.

``near`` leaves out the reference prompts that have a cosine above 0.85 (all-MiniLM-L6-v2) with a harmful row that is
trained on; ``random`` leaves out as many of the others, as a control of their number. All else is as it was.
"""

from __future__ import annotations

import random
import sys
from dataclasses import replace

from cwac_lab.core import cli
from cwac_lab.data import pools
from cwac_lab.judges.classifier import embed

COSINE = 0.85
build_pools = pools.build_pools


def main(which: str) -> None:
    """Carry out the run of the command line with fewer reference prompts."""

    def fewer(data: pools.DataConfig) -> pools.Pools:
        dealt = build_pools(data)
        asked, trained = dealt.get("harmful", "reference"), dealt.get("harmful", "finetune")
        x, y = (embed([row.prompt for row in rows]) for rows in (asked, trained))
        near = [row for row, highest in zip(asked, (x @ y.T).amax(1).tolist(), strict=True) if highest > COSINE]
        others = [row for row in asked if row not in near]
        left_out = near if which == "near" else random.Random(0).sample(others, len(near))
        kept = [row for row in asked if row not in left_out]
        print(f"references: {len(kept)} of {len(asked)}, {len(left_out)} left out ({which})")
        return replace(dealt, rows={**dealt.rows, "harmful": {**dealt.rows["harmful"], "reference": kept}})

    pools.build_pools = fewer
    from cwac_lab.train import main as train  # imported now, so that it finds what was put in place

    cli.launch(train)


if __name__ == "__main__":
    main(sys.argv.pop(1))
