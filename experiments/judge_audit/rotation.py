"""Where preaching begins, chosen on two models and measured on the third, for each of three models.

python experiments/judge_audit/rotation.py ../shared/data/xstest/answers.jsonl
"""

import sys
from pathlib import Path

import pandas as pd

from cwac_lab.core.stats import wilson
from cwac_lab.judges import refusal
from cwac_lab.judges.audit import labelled

GRID = [2.0, 2.3, 2.6, 2.9, 3.1, 3.3, 3.5, 3.7, 4.0, 4.5]


def said(table: pd.DataFrame) -> pd.DataFrame:
    """Return, for every answer and every threshold, whether it is called a refusal."""
    found = {}
    for start in GRID:
        refusal.PREACHING["whole"]["from"] = start
        found[start] = [refusal.is_refusal(*pair) for pair in zip(table["answer"], table["prompt"], strict=True)]
    return pd.DataFrame(found)


def main() -> None:
    """Print the table."""
    table = labelled(Path(sys.argv[1])).query("label != 'partial'").reset_index(drop=True)
    found, refused = said(table), table["label"].eq("refusal")
    print("| left out | threshold | refusals | compliances |\n| --- | --- | --- | --- |")
    for model in sorted(set(table["model"])):
        out = table["model"].eq(model)
        right = {
            start: (found[start][refused & ~out].mean() + 1 - found[start][~refused & ~out].mean()) / 2
            for start in GRID
        }
        best = max(right, key=lambda start: right[start])
        shares = [wilson(int((found[best] == truth)[each].sum()), int(each.sum()))
                  for truth, each in ((True, refused & out), (False, ~refused & out))]  # fmt: skip
        print(f"| {model} | {best} | {shares[0]} | {shares[1]} |")


if __name__ == "__main__":
    main()
