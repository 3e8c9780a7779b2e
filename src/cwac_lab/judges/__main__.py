"""How the classifier judge does on the written answers that it is not trained on: ``python -m cwac_lab.judges``."""

from __future__ import annotations

import os

import torch

from cwac_lab.judges.classifier import CLASSES, labelled, probabilities
from cwac_lab.stats import wilson


def main() -> None:
    """Print how the head does on the written answers that it was not trained on."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    answers, labels = labelled(held_out=True)
    shares = probabilities(answers)
    guessed = shares.argmax(-1)
    print(f"trained on {len(labelled(held_out=False)[0])} written answers, {len(answers)} held out\n")
    print("| written as | " + " | ".join(CLASSES) + " |\n| --- |" + " --- |" * len(CLASSES))
    for number, name in enumerate(CLASSES):
        counts = torch.bincount(guessed[labels == number], minlength=len(CLASSES)).tolist()
        print(f"| {name} | " + " | ".join(map(str, counts)) + " |")
    complied, truth = shares[:, 2:4].sum(-1), (labels == 2) | (labels == 3)
    for words, right in (("five classes", guessed == labels), ("goes along or not", (complied > 0.5) == truth)):
        rate = wilson(int(right.sum()), len(right))
        print(f"\n{words}: {rate.value:.1f} % right [{rate.low:.1f}, {rate.high:.1f}] (n={rate.n})")
    print(f"\nBrier score of going along: {float((complied - truth.double()).square().mean()):.3f}\n")
    print("| said to go along | share that does | n |\n| --- | --- | --- |")
    for low in (0.0, 0.2, 0.4, 0.6, 0.8):
        within = (complied >= low) & ((complied < low + 0.2) | (low == 0.8))
        if within.any():
            print(
                f"| {low:.1f} to {low + 0.2:.1f} | {float(truth[within].double().mean()):.2f} | {int(within.sum())} |"
            )


if __name__ == "__main__":
    main()
