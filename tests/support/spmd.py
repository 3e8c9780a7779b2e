"""What the processes of a run do in the tests of them; the first one saves what came out. Started by a test."""

import multiprocessing
import os
import signal
import socket
import sys
from dataclasses import replace
from pathlib import Path

import lightning as L
import torch
from safetensors.torch import save_file

from cwac_lab.config.run import read
from cwac_lab.core import distributed
from cwac_lab.core.cache import write_json
from cwac_lab.defenses.cwac.weight import WeightConstraint
from cwac_lab.defenses.interface import Composite
from cwac_lab.defenses.literature.lisa import Lisa
from cwac_lab.run.start_answers import start_answers
from support import tiny
from support.defenses import ACTIVE
from support.held import FULL, LORA, NULL_SPACE, ROWS, Kill, Killed, train, weights

FORK = multiprocessing.get_context("fork")
SETTINGS = {"learning_rate": 1e-3, "batch_size": 4, "rows": ROWS[:22]}
WHOLE = {"safegrad", "osf", "safe_delta", "ema", "pgm", "pgm_frobenius", "weight_slowed", "weight_penalised"}
SHARDABLE = [name for name in ACTIVE if not WHOLE & {name, *name.split("+")}]
TUNINGS = {"full": FULL, "lora": LORA, "null_space": NULL_SPACE, "ranked": replace(NULL_SPACE, free_directions=2)}
# Every defence under both strategies and in both ways of tuning: the other way under the other strategy.
TABLE = {
    "ddp": [(name, ("full", "lora")[place % 2]) for place, name in enumerate(ACTIVE)],
    "fsdp": [(name, ("lora", "full")[place % 2]) for place, name in enumerate(ACTIVE) if name in SHARDABLE],
}
# What stands for all in the fast set: both constraints, rows that change places, all ways of tuning.
FEW = {
    "ddp": [("lisa+weight", "full"), ("safegrad", "lora"), ("weight_both", "ranked")],
    "fsdp": [("coupled", "lora"), ("weight_both", "full"), ("coupled", "null_space")],
}
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
    """The defences that stand for all, and one with what else a step can be taken with."""
    rows(folder, strategy, FEW)
    found, _ = trained("coupled", "full", devices=2, strategy=strategy, accumulate=2, gradient_checkpointing=True)
    save(folder, "levers", found)


def table(folder, strategy):
    """Every defence."""
    rows(folder, strategy, TABLE)


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


def asked(folder, strategy):
    """What the start answers, asked by all."""
    told = start_answered(folder)
    if distributed.rank() == 0:
        write_json(folder / "start_answers.json", told)


def start_answered(folder):
    """Ask a lively start five prompts, and again, where the cache has the answers."""
    run = read(tiny.config(f"output_root={folder}", "evaluation.max_new_tokens=6"))
    rows = [{"kind": "harmful", "id": str(i), "prompt": f"{i} {'film ' * i}"} for i in range(5)]
    said = []
    given = [start_answers(run, rows, "weights", tiny.lively("llama"), tiny.chat(), said.append) for _ in range(2)]
    return {"said": said, "given": given}


def lose(folder, strategy):
    """One process is killed."""
    trained("coupled", "full", devices=2, strategy=strategy, callbacks=[Lost()])


def work(modes, strategies, where):
    with distributed.group(torch.device("cpu")):
        for strategy in strategies:
            for mode in modes:
                globals()[mode](where / strategy, strategy)


def _forked(rank, port, given):
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update(MASTER_ADDR="localhost", TORCHELASTIC_RUN_ID="forked")
    work(*given)


def fork(modes, strategies, where):
    """Let two processes that have everything imported do what a launcher's would; most of their time is work."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [FORK.Process(target=_forked, args=(rank, port, (modes, strategies, where))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]


if __name__ == "__main__":
    modes, strategies, where = sys.argv[1:]
    work(modes.split(","), strategies.split(","), Path(where))
