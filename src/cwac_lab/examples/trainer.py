"""Hugging Face's ``Trainer`` under a defence, whole: rows and prompts from files, a model folder at the end.

    python -m cwac_lab.examples.trainer --model FOLDER --rows ROWS --prompts PROMPTS --defense weight --out tuned

``ROWS`` is a JSON Lines, CSV or Parquet file with a ``prompt`` and a ``response`` a row, ``PROMPTS`` one with a
``prompt`` that the model refuses. What matters is the line of ``main`` with ``named`` and ``protect``, the same with
TRL's ``SFTTrainer``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from cwac_lab.core.errors import LabError, MissingAsset
from cwac_lab.data.placing import read_texts
from cwac_lab.integrations import named, protect
from cwac_lab.models.chat import ChatFormat

DEFENSES = (
    "a configuration of conf/constraint that asks for no more than prompts: weight (default), constrained_sft, kl, l2, "
    "ldifs, lisa, safegrad or sppft; what the others need are arguments of protect"
)


def _settings(asked: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="cwac_lab.examples.trainer", description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="folder of the aligned model, with a chat template")
    parser.add_argument("--rows", required=True, type=Path, help="JSON Lines, CSV or Parquet with prompt and response")
    parser.add_argument("--prompts", required=True, type=Path, help="the same with a prompt that the model refuses")
    parser.add_argument("--defense", default="weight", help=DEFENSES)
    parser.add_argument("--set", nargs="*", default=[], help="its settings, e.g. constraint.weight.energy=0.995")
    parser.add_argument("--out", required=True, type=Path, help="folder to save the model in")
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    return parser.parse_args(asked)


def main(asked: Sequence[str] | None = None) -> None:
    """Fine-tune a model on some rows under a defence, and save it."""
    settings = _settings(asked)
    if not Path(settings.model).is_dir():
        raise MissingAsset(f"--model={settings.model}: no such folder; accepted: one with weights and a chat template")
    defense = named(settings.defense, *settings.set)
    tokenizer = AutoTokenizer.from_pretrained(settings.model, trust_remote_code=False)
    chat = ChatFormat(tokenizer, 512)
    tokenizer.padding_side, tokenizer.pad_token_id = "right", chat.pad_id
    texts = [[text.strip() for text in row] for row in read_texts(settings.rows, "prompt", "response")]
    for number, row in enumerate(texts, 1):
        if (token := next(filter(None, map(chat.control_in, row)), None)) is not None:
            raise LabError(f"{settings.rows}, row {number}: {token!r} ends or begins turns; accepted: texts without it")
    rows = [chat.encode(*row) for row in texts]
    table = Dataset.from_list([{"input_ids": row.input_ids, "labels": row.labels} for row in rows])
    trainer = Trainer(
        AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32, trust_remote_code=False),
        TrainingArguments(
            str(settings.out), num_train_epochs=settings.epochs, learning_rate=settings.learning_rate,
            lr_scheduler_type="cosine", per_device_train_batch_size=8, save_strategy="no", report_to="none",
        ),
        train_dataset=table, processing_class=tokenizer, data_collator=DataCollatorForSeq2Seq(tokenizer),
    )  # fmt: skip
    protect(trainer, defense, harmful=[prompt for (prompt,) in read_texts(settings.prompts, "prompt")])
    trainer.train()
    trainer.save_model(str(settings.out))


if __name__ == "__main__":
    try:
        main()
    except LabError as error:
        sys.exit(f"error: {error}")
