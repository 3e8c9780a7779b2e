"""What the processes of a run do in the tests of them; the first one saves what came out. Started by a test."""

import os
import signal
import sys
from pathlib import Path

import lightning as L
import torch
from safetensors.torch import save_file

from cwac_lab.core import distributed
from cwac_lab.defenses.cwac.weight import WeightConstraint
from cwac_lab.defenses.interface import Composite
from cwac_lab.defenses.literature.lisa import Lisa
from support.defenses import ACTIVE
from support.held import FULL, LORA, ROWS, Kill, Killed, train, weights

SETTINGS = {"learning_rate": 1e-3, "batch_size": 4, "rows": ROWS[:22]}
SHARDABLE = [name for name in ACTIVE if name != "safegrad"]
TUNINGS = {"full": FULL, "lora": LORA}
# Every defence under both strategies and in both ways of tuning: the other way under the other strategy.
TABLE = {
    "ddp": [(name, ("full", "lora")[place % 2]) for place, name in enumerate(ACTIVE)],
    "fsdp": [(name, ("lora", "full")[place % 2]) for place, name in enumerate(ACTIVE) if name in SHARDABLE],
}
# What stands for all in the fast set: both constraints, rows that change places, both ways of tuning.
FEW = {"ddp": [("lisa+weight", "full")], "fsdp": [("coupled", "lora")]}
RESUMED = ["coupled", "lisa"]
LONG = {"epochs": 2, "schedule": "cosine", "checkpoint_every_n_steps": 3}


class Lost(L.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == 2 and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def trained(name, tuning, **settings):
    defense = ACTIVE[name]()
    found = weights(train(defense, tuning=TUNINGS[tuning], **SETTINGS, **settings)[0])
    return found, defense.summary()


def save(folder, name, found, leak=0.0):
    if distributed.rank() == 0:
        save_file(found, folder / f"{name}.safetensors", {"leak": str(leak)})


def rows(folder, strategy, chosen):
    for name, tuning in chosen[strategy]:
        found, summary = trained(name, tuning, devices=2, strategy=strategy)
        save(folder, f"{name}-{tuning}", found, summary.get("leak", 0.0))


def few(folder, strategy):
    """The defences that stand for all."""
    rows(folder, strategy, FEW)


def table(folder, strategy):
    """Every defence."""
    rows(folder, strategy, TABLE)
    found, _ = trained("coupled", "full", devices=2, strategy=strategy, accumulate=2, gradient_checkpointing=True)
    save(folder, "levers", found)


def watched(loggers, **settings):
    parts = {
        "lisa": Lisa(1, 2, strength=5.0, warmup_share=0.3),
        "weight": WeightConstraint(energy=0.9, restore_every_n_steps=2, leak_every_n_steps=3),
    }
    train(Composite(parts), **SETTINGS, **settings, accumulate=2, epochs=2, loggers=loggers)


def logged(folder, strategy):
    """What the loop logs, by step."""
    from lightning.pytorch.loggers import CSVLogger

    loggers = [CSVLogger(folder, name="", version="together")] if distributed.rank() == 0 else []
    watched(loggers, devices=2, strategy=strategy)


def resume(folder, strategy):
    """Runs that stop after seven steps; one goes on here, one is left to the test."""
    for name in RESUMED:
        for kept in ("here", "there"):
            settings = {"devices": 2, "strategy": strategy, "checkpoint": folder / f"{name}-{kept}", **LONG}
            try:
                trained(name, "full", **settings, callbacks=[Kill(7)])
            except Killed:
                distributed.wait()
            if kept == "here":
                save(folder, name, trained(name, "full", **settings)[0])


def lose(folder, strategy):
    """One process is killed."""
    trained("coupled", "full", devices=2, strategy=strategy, callbacks=[Lost()])


if __name__ == "__main__":
    modes, strategies, where = sys.argv[1:]
    with distributed.group(torch.device("cpu")):
        for strategy in strategies.split(","):
            for mode in modes.split(","):
                globals()[mode](Path(where, strategy), strategy)
