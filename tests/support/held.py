"""Training a tiny model under a defence that is prepared with whatever it needs."""

from __future__ import annotations

from dataclasses import replace

import lightning as L
import torch

from cwac_lab.data.mixing import TrainRow
from cwac_lab.defenses.cwac.null_space import attach
from cwac_lab.defenses.cwac.sae.latents import LayerFeatures
from cwac_lab.defenses.cwac.subspace.basis import leading, subspace_of
from cwac_lab.defenses.interface import Context, finish
from cwac_lab.models.adapters import TuningConfig
from cwac_lab.training.loop import fit
from cwac_lab.training.settings import TrainerConfig
from support import tiny

FULL, LORA = TuningConfig(), TuningConfig(method="lora", rank=3, alpha=6)
NULL_SPACE = TuningConfig(method="null_space")
HALF, QLORA = replace(LORA, base="bfloat16"), replace(LORA, base="nf4")
# Rows of 64 weights, a block of 4-bit numbers.
WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
ROWS = [(f"question {i} " + "more " * (i % 5), "an answer " + str(i)) for i in range(24)]
PROMPTS = [f"request number {i}, how do I" + " really" * (i % 3) for i in range(7)]


def context(model, defense, reference=None, **more):
    chat, needs = tiny.chat(), defense.requirements
    reference = reference or [chat.prompt_ids(prompt) for prompt in PROMPTS]
    subspace = None
    if needs.subspace is not None:
        subspace = subspace_of(leading(model, reference, needs.subspace, chat.pad_id))
    features = ()
    if needs.features is not None:
        source = torch.Generator().manual_seed(1)
        weight = torch.randn(model.config.hidden_size, 12, generator=source)
        latents = torch.arange(needs.features.n_latents)
        features = (LayerFeatures(1, weight, torch.zeros(12), 6, latents, torch.ones(len(latents))),)
    start = {name: value.detach().clone() for name, value in model.state_dict().items()}
    benign = [chat.prompt_ids(prompt) for prompt, _ in ROWS[:5]]
    refusals = [TrainRow(prompt, prompt, "I can't help with that.", False) for prompt in PROMPTS]
    noise = torch.Generator().manual_seed(2)
    base = {name: value + 0.02 * torch.randn(value.shape, generator=noise) for name, value in start.items()}
    return Context(
        model,
        0,
        chat,
        start.__getitem__,
        reference,
        benign,
        refusals,
        base_weight=base.__getitem__,
        subspace=subspace,
        features=features,
        **more,
    )


class Killed(Exception):
    """What ``Kill`` raises."""


class Kill(L.Callback):
    def __init__(self, batch):
        self.batch = batch

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == self.batch:
            raise Killed


def start(architecture, tuning):
    built = tiny.model(architecture, **(WIDE if tuning.base == "nf4" else {}), **tiny.MIXTURES.get(architecture, {}))
    return built.to(tuning.dtype or torch.float32)


def train(defense, *, architecture="llama", rows=ROWS, tuning=FULL, **settings):
    model, chat = start(architecture, tuning), tiny.chat()
    prepared = context(model, defense)
    ids = [chat.encode(*row).input_ids for row in rows]
    merge = attach(model, tuning, 0, defense.requirements.subspace, prepared.subspace, ids, chat.pad_id)
    defense.prepare(prepared)
    rows = [
        (row.prompt, row.response)
        for row in defense.wrap_dataset([TrainRow(prompt, prompt, answer, False) for prompt, answer in rows])
    ]
    options = {"batch_size": 4, "learning_rate": 1e-2, "weight_decay": 0.1, "progress_bar": False} | settings
    checkpoint = options.pop("checkpoint", None)
    loops = {name: options.pop(name, ()) for name in ("callbacks", "loggers", "others")}
    examples = [chat.encode(*row) for row in rows]
    fit(model, examples, chat.pad_id, defense, TrainerConfig(**options), 0, checkpoint=checkpoint, **loops)
    finish(defense, model, merge)
    return model, prepared


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def assert_moved_alike(found, expected, start):
    """Two ways of training moved the weights alike: AdamW blows single rounding errors up, so norms are compared.

    They agree to 5e-5 but for an element whose gradient is rounding itself, which moves by a share of the rate: 3e-3 of
    a matrix's move was seen on a machine without AVX-512.
    """
    for name, value in expected.items():
        moved = (value - start[name]).norm()
        assert (found[name] - value).norm() <= 6e-3 * moved + 1e-6, name
