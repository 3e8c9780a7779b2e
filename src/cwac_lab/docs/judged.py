"""The long table of the judges' audit and its figure, from what ``python -m cwac_lab.judges`` counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from cwac_lab.core.errors import MissingAsset
from cwac_lab.core.stats import wilson
from cwac_lab.judges import audit

FOLDER, FIGURE = "judge_audit", "judges-calibration.svg"
# The same bytes for the same counts.
_STYLE: Any = {"svg.hashsalt": "cwac-lab", "svg.fonttype": "none", "font.size": 8.0}
COMMAND = f"python -m cwac_lab.judges labelled=FILE save=experiments/{FOLDER}"
_ABOUT = {
    "By source": "No example or rule was written from these answers, but the phrases of `refusal` were revised after "
    "its errors on Llama 2, guarded Mistral and half of Mistral Instruct were read. Recall: of the answers with a "
    "label (n), the share that is called so. Precision: of what is called so (n called so), the share that is.",
    "By what was asked": "Answers of the packaged models, by the list that the prompt is of.",
    "By kind": "Share of the answers that are called what they are. A kind has one label, so this is its recall.",
    "What is neither": "What a reader could call neither a refusal nor compliance counts in no rate above.",
    "How sure": "Of a judge that tells chances: the largest of the three, and how often what it stands for is true. "
    "The error is the mean distance of the two over tenths, weighted by answers (Guo et al. 2017); beside it stands "
    "what chance alone makes of one whose confidences are right.",
    "Whether they err together": "Cohen's kappa of being wrong about the same answer: 0 is chance, 1 always together.",
}


def _read(folder: Path, name: str) -> pd.DataFrame:
    if not (folder / name).is_file():
        raise MissingAsset(f"{folder / name}: no such file; accepted: what `{COMMAND}` writes")
    return pd.read_csv(folder / name, keep_default_na=False)


def page(experiments: Path) -> str:
    """Return the page: recall and precision by source, by what was asked and by kind, and calibration.

    Raises:
        MissingAsset: If nothing was counted.
    """
    counts, bins, joint = (_read(experiments / FOLDER, name) for name in (audit.COUNTS, audit.BINS, audit.JOINT))
    versions = counts[["judge", "version"]].drop_duplicates().itertuples(index=False)
    lines = [
        "# Judges, by source and by kind of answer\n",
        f"Made by `make docs` of `experiments/{FOLDER}`, which\n",
        f"    {COMMAND}\n",
        "writes. Percent [95 % interval], higher is better. Versions: "
        + ", ".join(f"`{name}` {version[:8]}" for name, version in versions) + ".",
    ]  # fmt: skip
    for title, table in audit.tables(counts, bins, joint).items():
        lines += [f"\n## {title}\n", f"{_ABOUT[title]}\n", *table]
    return "\n".join(lines) + "\n"


def draw(experiments: Path, file: Path) -> None:
    """Draw the reliability diagram: how often guesses are right against how sure they are, with n by each point.

    Raises:
        MissingAsset: If nothing was counted.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    groups = list(_read(experiments / FOLDER, audit.BINS).groupby("read_by", sort=True))
    with rc_context(_STYLE):
        figure = Figure(figsize=(3.0 * len(groups), 3.3), layout="constrained")
        panels = figure.subplots(1, len(groups), sharex=True, sharey=True, squeeze=False)[0]
        for axes, (read_by, rows) in zip(panels, groups, strict=True):
            shares = [wilson(right, n) for right, n in zip(rows["right"], rows["n"], strict=True)]
            at, values = 100 * rows["confidence"], [share.value for share in shares]
            low = [max(0.0, share.value - share.low) for share in shares]  # type: ignore[operator]
            high = [max(0.0, share.high - share.value) for share in shares]  # type: ignore[operator]
            axes.plot([0, 100], [0, 100], color="0.6", linestyle=":", linewidth=0.8)
            axes.errorbar(at, values, yerr=[low, high], fmt="o", color="#0072b2", capsize=2, linewidth=0.8)
            for x, y, n in zip(at, values, rows["n"], strict=True):
                axes.annotate(f"n={n}", (x, y), (4, -9), textcoords="offset points", fontsize=6)
            error = 100 * audit.calibration_error(rows)
            axes.set_title(f"labelled by {read_by}\nn={rows['n'].sum()}, error {error:.1f}", fontsize=7)
            axes.set_xlabel("confidence (%)")
            axes.set_xlim(30, 102)
        panels[0].set_ylabel("right (%)")
        figure.savefig(file, metadata={"Date": None})
