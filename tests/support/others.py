"""Tiny models in other libraries' trainers under every defence, as a user has them: loaded from folders, with PEFT."""

from __future__ import annotations

import warnings

import datasets
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

from cwac_lab.defenses.cwac.activation import ActivationConstraint
from cwac_lab.defenses.cwac.sae import latents
from cwac_lab.defenses.cwac.weight import WeightConstraint
from cwac_lab.defenses.interface import Composite
from cwac_lab.defenses.literature.asft import AsFT
from cwac_lab.defenses.literature.constrained_sft import ConstrainedSFT
from cwac_lab.defenses.literature.ema import EMA
from cwac_lab.defenses.literature.kl import KL
from cwac_lab.defenses.literature.l2 import L2
from cwac_lab.defenses.literature.ldifs import LDIFS
from cwac_lab.defenses.literature.lisa import Lisa
from cwac_lab.defenses.literature.pgm import PGM
from cwac_lab.defenses.literature.safe_delta import SafeDelta
from cwac_lab.defenses.literature.safegrad import SafeGrad
from cwac_lab.defenses.literature.safelora import SafeLoRA
from cwac_lab.defenses.literature.sppft import SPPFT
from cwac_lab.integrations import protect
from cwac_lab.models.few_bits import keep_layout
from support import tiny
from support.held import PROMPTS, ROWS, WIDE, weights

# Defences whose settings are the same in all tests of a trainer.
COMMON = {
    "activation": lambda: ActivationConstraint(strength=5, n_latents=4, depths=[0.5], every_n_steps=1),
    "l2": lambda: L2(strength=3),
    "kl": lambda: KL(strength=2),
    "constrained_sft": lambda: ConstrainedSFT(beta=0.5),
    "ldifs": lambda: LDIFS(strength=3),
    "lisa": lambda: Lisa(safety_steps=1, user_steps=2, strength=1),
    "pgm": lambda: PGM(radius=0.05),
    "safegrad": lambda: SafeGrad(strength=1),
    "sppft": lambda: SPPFT(block=[0.0, 0.5]),
}
ACTIVE = {
    "none": Composite,
    "weight": lambda: WeightConstraint(energy=0.9, restore_every_n_steps=100),
    "weight_all": lambda: WeightConstraint(energy=0.9, trainable="all", restore_every_n_steps=2),
    "weight_update": lambda: WeightConstraint(energy=0.9, projection="update"),
    "coupled": lambda: Composite(
        {
            "weight": WeightConstraint(energy=0.9, restore_every_n_steps=100),
            "activation": ActivationConstraint(strength=5, n_latents=4, depths=[0.5], every_n_steps=2),
        }
    ),
    "safelora": lambda: SafeLoRA(share=0.5, modules="all_linear", mode="exact", rank=4),
    "weight+safelora": lambda: Composite(
        {"weight": WeightConstraint(energy=0.9, restore_every_n_steps=100), "safelora": SafeLoRA(share=0.5)}
    ),
    "safe_delta": lambda: SafeDelta(strength=50.0),
    "asft": lambda: AsFT(strength=2),
    "ema": lambda: EMA(decay=0.7),
    **COMMON,
}
IDS = torch.arange(20, 60)[None]


def start_folder(made):
    """Return the folder with the start, and the features of an activation constraint for it."""
    model = tiny.model(**WIDE)
    model.save_pretrained(made)
    source = torch.Generator().manual_seed(1)
    encoder = torch.randn(64, 12, generator=source), torch.zeros(12), 6
    marked = {layer: latents.signature(model, layer) for layer in (0, 1)}
    for name, layer, n in (("features", 1, 4), ("lower", 0, 4), ("fewer", 1, 3)):
        (made / name).mkdir()
        latents.export(
            made / name, layer, encoder, torch.arange(n), torch.ones(12), torch.ones(n), {}, marked[layer]
        )  # fmt: skip
    return made


def start(folder, way):
    if way != "qlora":
        return AutoModelForCausalLM.from_pretrained(folder)
    few = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=few, dtype=torch.bfloat16)


def adapted(folder, way, **more):
    model = start(folder, way)
    if way == "full":
        return model
    paths = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return get_peft_model(model, LoraConfig(r=3, lora_alpha=6, target_modules=paths, **more))


def trainer_of(model, output, rows=ROWS, kind="Trainer", **more):
    """A ``Trainer`` on token ids, or an ``SFTTrainer`` on messages, in float32 or in bf16 (its default)."""
    settings = {
        "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "weight_decay": 0.1,
        "lr_scheduler_type": "constant", "use_cpu": True, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "logging_strategy": "no", "seed": 0, "output_dir": str(output),
    } | more  # fmt: skip
    chat = tiny.chat()
    if kind.startswith("SFTTrainer"):
        from trl import SFTConfig, SFTTrainer

        said = [
            {"prompt": [{"role": "user", "content": asked}], "completion": [{"role": "assistant", "content": answer}]}
            for asked, answer in rows
        ]
        table = datasets.Dataset.from_list(said)
        return SFTTrainer(
            model, SFTConfig(bf16="bf16" in kind, **settings), train_dataset=table, eval_dataset=table,
            processing_class=chat.tokenizer,
        )  # fmt: skip
    encoded = [chat.encode(*row) for row in rows]
    table = datasets.Dataset.from_dict(
        {
            "input_ids": [row.input_ids for row in encoded],
            "attention_mask": [[1] * len(row.input_ids) for row in encoded],
            "labels": [row.labels for row in encoded],
        }
    )
    return Trainer(
        model, TrainingArguments(**settings), train_dataset=table, eval_dataset=table,
        processing_class=chat.tokenizer, data_collator=DataCollatorForSeq2Seq(chat.tokenizer, padding=True),
    )  # fmt: skip


def put_under(trainer, defense, folder):
    held = weights(tiny.model(**WIDE))
    noise = torch.Generator().manual_seed(2)
    base = {name: value + 0.02 * torch.randn(value.shape, generator=noise) for name, value in held.items()}
    needs = defense.requirements
    return protect(
        trainer, defense, harmful=PROMPTS, features=folder / "features" if needs.features else None,
        base_weight=base.__getitem__ if needs.base_weights else None,
    )  # fmt: skip


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(IDS.to(model.device)).logits.float()


def loaded(folder, way, saved):
    """Return what a user loads, who knows nothing of this project; a word about missing weights is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="(?i).*(missing|unexpected|not initialized|newly initialized).*")
        if way == "full":
            return AutoModelForCausalLM.from_pretrained(saved)
        base = start(folder, way)
        keep_layout(base)  # another one has other scales
        return PeftModel.from_pretrained(base, saved)
