"""Trains under every defence in the processes of a run; the first one saves what came out. Started by a test."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from contract.test_defenses import ACTIVE
from cwac_lab import distributed
from held import FULL, LORA, ROWS, train, weights

SETTINGS = {"learning_rate": 1e-3, "batch_size": 4, "rows": ROWS[:22]}
TUNINGS = {"full": FULL, "lora": LORA}


def trained(name, tuning, **settings):
    defense = ACTIVE[name]()
    found = weights(train(defense, tuning=TUNINGS[tuning], **SETTINGS, **settings)[0])
    return found, defense.summary()


def main(folder, strategy):
    for tuning in TUNINGS:
        for name in ACTIVE:
            found, summary = trained(name, tuning, devices=2, strategy=strategy)
            if distributed.rank() == 0:
                save_file(found, folder / f"{name}-{tuning}.safetensors", {"leak": str(summary.get("leak", 0.0))})


if __name__ == "__main__":
    with distributed.group(torch.device("cpu")):
        main(Path(sys.argv[1]), sys.argv[2])
