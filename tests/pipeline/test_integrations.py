"""Defences in other trainers end where the Lightning loop ends."""

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from cwac_lab.core import linalg
from cwac_lab.core.cache import write_jsonl
from cwac_lab.core.errors import ConfigError, LabError
from cwac_lab.defenses.cwac.activation import ActivationConstraint
from cwac_lab.defenses.cwac.subspace.basis import leading
from cwac_lab.defenses.cwac.weight import WeightConstraint
from cwac_lab.defenses.interface import Composite
from cwac_lab.defenses.literature.kl import KL
from cwac_lab.defenses.literature.ldifs import LDIFS
from cwac_lab.defenses.literature.osf import OSF
from cwac_lab.defenses.literature.safe_instruct import SafeInstruct
from cwac_lab.defenses.literature.safelora import SafeLoRA
from cwac_lab.examples import trainer as example
from cwac_lab.integrations import DefenseCallback, named, protect
from cwac_lab.models.chat import IGNORED, Encoded
from cwac_lab.models.sites import linears
from cwac_lab.training.module import TrainData
from support import tiny
from support.cover import some, table
from support.held import FULL, LORA, PROMPTS, ROWS, assert_moved_alike, context, train, weights
from support.held import start as begin
from support.others import COMMON, trainer_of

DEFENSES = {
    "none": Composite,
    "weight": lambda: WeightConstraint(energy=0.9),
    "weight_update": lambda: WeightConstraint(energy=0.9, projection="update", trainable="all"),
    "coupled": lambda: Composite(
        {
            "weight": WeightConstraint(energy=0.9),
            "activation": ActivationConstraint(strength=5, n_latents=4, depths=[0.5], every_n_steps=2),
        }
    ),
    "safelora": lambda: SafeLoRA(share=0.5),
    **COMMON,
}
# Each moves weights where the other has put them.
BOTH = Composite({"osf": OSF(), "weight": WeightConstraint(energy=0.9)})
SETTINGS = {"schedule": "constant", "epochs": 1, "batch_size": 4, "learning_rate": 1e-2, "weight_decay": 0.1}


@pytest.mark.parametrize("way", ["full", "lora"])
@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_families_without_linear_layers_are_held_in_another_trainer(family, way, tmp_path):
    model, chat = begin(family, FULL), tiny.chat()
    before = weights(model)
    if way == "lora":
        where = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
        if family == "mixtral":
            parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
            where = {"target_modules": ["q_proj"], "target_parameters": parameters}
        model = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, **where))
    trainer, defense = trainer_of(model, tmp_path), WeightConstraint(energy=0.9)
    callback = protect(trainer, defense, harmful=PROMPTS)
    trainer.train()
    trained, moved = callback.merged(), 0
    spec, prompts = defense.requirements.subspace, [chat.prompt_ids(prompt) for prompt in PROMPTS]
    held, after = dict(leading(begin(family, FULL), prompts, spec, chat.pad_id)), weights(trained)
    for matrix in linears(trained, "all_linear"):
        update = matrix.of(after[matrix.name] - before[matrix.name])
        leaked, norm = linalg.leak(update, held[matrix.site.name].basis)
        assert leaked <= 1e-8 * norm
        moved += norm > 0
    assert moved >= 8
    assert defense.leak() < 1e-5


def arguments(folder, kind=TrainingArguments, **more):
    settings = {
        "num_train_epochs": 1, "learning_rate": 1e-2, "weight_decay": 0.1, "max_grad_norm": 1.0,
        "lr_scheduler_type": "constant", "train_sampling_strategy": "sequential", "optim": "adamw_torch_fused",
        "use_cpu": True, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_strategy": "no",
        "seed": 0,
    }  # fmt: skip
    return kind(output_dir=str(folder), **(settings | more))


def in_order() -> list[Encoded]:
    """The rows in the order of the Lightning loop's steps."""
    chat = tiny.chat()
    rows = [chat.encode(*row) for row in ROWS]
    plan = TrainData(rows, chat.pad_id, 4, 1, 0).plan
    return [rows[i] for step in plan for i in step]


def other_trainer(model, rows, folder, **more):
    table = datasets.Dataset.from_dict(
        {
            "input_ids": [row.input_ids for row in rows],
            "attention_mask": [[1] * len(row.input_ids) for row in rows],
            "labels": [row.labels for row in rows],
        }
    )
    settings = arguments(folder, **{"per_device_train_batch_size": 4, **more})
    return Trainer(
        model, settings, train_dataset=table, processing_class=tiny.tokenizer(),
        data_collator=DataCollatorForSeq2Seq(tiny.tokenizer(), padding=True),
    )  # fmt: skip


def sft_trainer(model, rows, folder):
    """TRL's trainer on the same ids, in the same precision."""
    from trl import SFTConfig, SFTTrainer

    answers = [[int(label != IGNORED) for label in row.labels] for row in rows]
    table = datasets.Dataset.from_dict({"input_ids": [row.input_ids for row in rows], "completion_mask": answers})
    settings = arguments(
        folder, SFTConfig, per_device_train_batch_size=4, max_length=None, completion_only_loss=True,
        bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    return SFTTrainer(model, settings, train_dataset=table, processing_class=tiny.tokenizer())


@table(name=DEFENSES, way=["full", "peft", "full in SFTTrainer", "peft in SFTTrainer"])
def test_a_defence_ends_where_the_lightning_loop_ends(name, way, tmp_path):
    build, tuning = DEFENSES[name], LORA if way.startswith("peft") else FULL
    start = weights(tiny.model())
    expected, _ = train(build(), tuning=tuning, **SETTINGS)
    model, defense = tiny.model(), build()
    prepared = context(model, defense)
    if tuning is LORA:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            paths = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
            model = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, target_modules=paths))
    made = sft_trainer if way.endswith("SFTTrainer") else other_trainer
    trainer = made(model, in_order(), tmp_path)
    defense.prepare(prepared)
    callback = DefenseCallback(trainer, defense, prepared.model)
    trainer.add_callback(callback)
    trainer.train()
    found = callback.merged() if tuning is LORA else model
    assert_moved_alike(weights(found), weights(expected), start)


def test_protect_prepares_by_itself(tmp_path):
    defense = WeightConstraint(energy=0.9)
    model = tiny.model()
    trainer = other_trainer(model, in_order(), tmp_path)
    protect(trainer, defense, harmful=PROMPTS)
    trainer.train()
    assert defense.summary()["leak"] < 1e-5
    expected, _ = train(WeightConstraint(energy=0.9), **SETTINGS)
    assert_moved_alike(weights(model), weights(expected), weights(tiny.model()))


# Answers of unequal length: a mean of means over two rows is not the mean over four.
UNEQUAL = [(f"task {i}" + " please" * (i % 3), "yes " * (1 + 7 * (i % 2) + i % 3)) for i in range(10)]
ACCUMULATED = [
    *((name, FULL) for name in DEFENSES if name not in ("none", "sppft", "weight_update", "coupled")),
    ("ldifs", LORA),
    ("constrained_sft", LORA),
]


# Rows of one kind of term each: of the weights, of the batch, of rows that the start answered.
FEW = (("weight", FULL), ("kl", FULL), ("lisa", FULL), ("constrained_sft", LORA))


@pytest.mark.parametrize(("name", "tuning"), some(ACCUMULATED, *FEW))
def test_accumulation_changes_rounding_only(name, tuning, tmp_path):
    """Ten rows in steps of four: the last has two, in one piece."""
    builds = {**DEFENSES, "kl": lambda: KL(strength=20), "ldifs": lambda: LDIFS(strength=30)}
    chat, found = tiny.chat(), {}
    for size, shares in ((4, 1), (2, 2), (1, 4)):
        defense, model = builds[name](), tiny.model()
        prepared = context(model, defense)
        if tuning is LORA:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"]))
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": shares, "learning_rate": 1e-3}
        trainer = other_trainer(model, [chat.encode(*row) for row in UNEQUAL], tmp_path, **settings)
        defense.prepare(prepared)
        callback = DefenseCallback(trainer, defense, prepared.model)
        trainer.add_callback(callback)
        trainer.train()
        found[shares] = weights(callback.merged())
    for shares in (2, 4):
        assert_moved_alike(found[shares], found[1], weights(tiny.model()))


@pytest.mark.parametrize("name", ["kl", "constrained_sft"])
def test_rows_that_an_epoch_leaves_out_are_known_in_the_next(name, tmp_path):
    """Ten rows in batches of four: the two that one epoch drops are not those that the next does."""
    chat, defense = tiny.chat(), DEFENSES[name]()
    more = {"dataloader_drop_last": True, "num_train_epochs": 4, "train_sampling_strategy": "random"}
    trainer = other_trainer(tiny.model(), [chat.encode(*row) for row in UNEQUAL], tmp_path, **more)
    protect(trainer, defense)
    trainer.train()
    assert trainer.state.global_step == 8
    assert trainer.args.dataloader_drop_last


def test_rows_that_change_between_epochs_are_one_line(tmp_path):
    chat, defense = tiny.chat(), KL(strength=1)
    trainer = other_trainer(tiny.model(), [chat.encode(*row) for row in UNEQUAL], tmp_path)
    protect(trainer, defense)
    collate, calls = trainer.data_collator, []

    def changing(rows):
        calls.append(1)
        batch = collate(rows)
        batch["input_ids"][:, 3] = 40 + len(calls)
        return batch

    trainer.data_collator = changing
    with pytest.raises(LabError, match=r"4 of 4 rows were not asked of the start \(accepted: rows that never change\)"):
        trainer.train()


def test_a_name_is_that_of_the_command_line():
    defense = named("coupled", "constraint.weight.energy=0.9")
    assert list(defense.parts) == ["weight", "activation"]
    assert defense.parts["weight"].energy == 0.9
    assert list(named("[weight,lisa]").parts) == ["weight", "lisa"]


@pytest.mark.parametrize(
    ("defense", "given", "line"),
    [
        (WeightConstraint(energy=0.9), {}, "protect: harmful=None: accepted: a value: the defence needs it"),
        (ActivationConstraint(), {"harmful": PROMPTS}, "protect: features=None"),
        (ActivationConstraint(answer_tokens=2), {"harmful": PROMPTS}, "answer_tokens=above 0: accepted: 0 with"),
        (WeightConstraint(answers="own"), {"harmful": PROMPTS}, "answers=own: accepted: none with protect"),
        (SafeLoRA(), {}, "protect: base_weight=None"),
        (WeightConstraint(energy=0.9, held_on="both"), {"harmful": PROMPTS}, "protect: benign=None"),
        (WeightConstraint(energy=0.9, held_on="harmless"), {"harmful": PROMPTS}, "protect: benign=None"),
        (BOTH, {"harmful": PROMPTS}, r"constraint=\[osf,weight\]: accepted: one of osf \| weight: each moves"),
        (SafeInstruct(share=0.1), {"harmful": PROMPTS}, "a defence without rows of its own"),
    ],
)
def test_what_is_missing_is_one_line(defense, given, line, tmp_path):
    trainer = other_trainer(tiny.model(), in_order(), tmp_path)
    with pytest.raises(ConfigError, match=line):
        protect(trainer, defense, **given)


def test_half_weights_do_not_go_with_an_exact_projection(tmp_path):
    trainer = other_trainer(tiny.model().to(torch.bfloat16), in_order(), tmp_path)
    with pytest.raises(ConfigError, match="protect: dtype"):
        protect(trainer, WeightConstraint(energy=0.9), harmful=PROMPTS)


def test_the_example_script_holds_the_constraint(tiny_folder, tmp_path):
    rows = [{"prompt": prompt, "response": response} for prompt, response in ROWS]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder, padding_side="left")
    tiny.model().bfloat16().save_pretrained(tmp_path / "start")  # as most models are published
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "start")
    given = ["--model", str(tmp_path / "start"), "--rows", str(tmp_path / "rows.jsonl"), "--learning-rate", "1e-2"]
    given += ["--prompts", str(tmp_path / "prompts.jsonl"), "--out", str(tmp_path / "out")]
    example.main([*given, "--set", "constraint.weight.energy=0.9"])
    start, moved = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32) for name in ("start", "out")
    )
    chat = tiny.chat()
    prompts = [chat.prompt_ids(prompt) for prompt in PROMPTS]
    spec = named("weight", "constraint.weight.energy=0.9").requirements.subspace
    held = dict(leading(start, prompts, spec, chat.pad_id))
    before, after = weights(start), weights(moved)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    for matrix in linears(start, "all_linear"):
        leaked, norm = linalg.leak(after[matrix.name] - before[matrix.name], held[matrix.site.name].basis)
        assert leaked <= 1e-8 * norm
