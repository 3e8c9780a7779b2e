"""Training by hand, with nothing clever: what the baselines are compared with."""

from __future__ import annotations

import copy

import torch
from torch.nn.functional import cross_entropy

from cwac_lab.data.batches import collate
from cwac_lab.data.mixing import TrainRow
from cwac_lab.defenses.interface import Context
from cwac_lab.models.chat import IGNORED
from cwac_lab.training.loop import fit
from cwac_lab.training.module import TrainData
from cwac_lab.training.settings import TrainerConfig
from support import tiny

ROWS = [(f"question {i} " + "more " * (i % 4), "an answer " + str(i)) for i in range(16)]
REFUSALS = [TrainRow(f"r{i}", f"bad request {i}" + " now" * (i % 3), "I can't help.", False) for i in range(5)]
RATE = 3e-3
SITES = [f"model.layers.{layer}.self_attn.{name}_proj.weight" for layer in range(2) for name in ("q", "k", "v", "o")]


def base_of(start):
    source = torch.Generator().manual_seed(5)
    return {name: value - 0.05 * torch.randn(value.shape, generator=source) for name, value in start.items()}


def context(model):
    start = {name: value.detach().clone() for name, value in model.state_dict().items()}
    return Context(model, 0, tiny.chat(), start.__getitem__, refusals=REFUSALS, base_weight=base_of(start).__getitem__)


def trained(defense, **changes):
    """Return the weights after the bench's own training."""
    model, chat = tiny.model(**changes), tiny.chat()
    defense.prepare(context(model))
    examples = [chat.encode(*row) for row in ROWS]
    options = TrainerConfig(
        batch_size=4, learning_rate=RATE, schedule="constant", gradient_clip=0.0, progress_bar=False
    )
    fit(model, examples, chat.pad_id, defense, options, 0)
    defense.after_training(model)
    return model.state_dict()


def batches():
    chat = tiny.chat()
    data = TrainData([chat.encode(*row) for row in ROWS], chat.pad_id, 4, 1, 0)
    return list(data.train_dataloader())


def token_losses(model, batch):
    """Return log-probabilities (N, V) at the answer tokens, and the tokens, from a full forward."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    return logits[targets != IGNORED].log_softmax(-1), targets[targets != IGNORED]


def plain(loss, *, freeze=(), after=None, batch_of=None, gradients=None, **changes):
    """Train by hand: ``loss(model, start, batch, step)``, AdamW, nothing clever."""
    model = tiny.model(**changes)
    start = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in freeze))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    for step, batch in enumerate(batches()):
        batch = batch_of(step, batch) if batch_of else batch
        optimizer.zero_grad()
        loss(model, start, batch, step).backward()
        if gradients:
            gradients(model, start, step)
        optimizer.step()
        if after:
            after(model, step)
    return model.state_dict()


def sft(model, start, batch, step):
    logits, targets = token_losses(model, batch)
    return cross_entropy(logits, targets)


def assert_equal(found, expected):
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=2e-5, rtol=1e-4, msg=lambda text, at=name: f"{at}: {text}")


def squared(model, anchor):
    return sum((p - anchor[name]).square().sum() for name, p in model.named_parameters())


def refusal_batch(rows):
    chat = tiny.chat()
    return collate([chat.encode(REFUSALS[row].prompt, REFUSALS[row].response) for row in rows], chat.pad_id)
