"""What is saved, kept on the way, loaded again and merged is the model that was trained, and under its constraint.

Every defence occurs under both trainers, every way of tuning with both; not every combination.
"""

import warnings

import datasets
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import tiny
from cwac_lab import linalg
from cwac_lab.baselines.asft import AsFT
from cwac_lab.baselines.constrained_sft import ConstrainedSFT
from cwac_lab.baselines.kl import KL
from cwac_lab.baselines.l2 import L2
from cwac_lab.baselines.ldifs import LDIFS
from cwac_lab.baselines.lisa import Lisa
from cwac_lab.baselines.safegrad import SafeGrad
from cwac_lab.baselines.safelora import SafeLoRA
from cwac_lab.baselines.sppft import SPPFT
from cwac_lab.constraints.activation import ActivationConstraint
from cwac_lab.constraints.weight import WeightConstraint
from cwac_lab.defense import Composite
from cwac_lab.errors import LabError
from cwac_lab.integrations import protect
from cwac_lab.models.adapters import dense
from cwac_lab.models.sites import linears
from cwac_lab.sae import latents
from cwac_lab.subspace.basis import leading
from cwac_lab.training.checkpoint import Resume
from held import FULL, LORA, PROMPTS, QLORA, ROWS, WIDE, Kill, Killed, same, train, weights

ACTIVE = {
    "none": Composite,
    "weight": lambda: WeightConstraint(energy=0.9, restore_every_n_steps=100),
    "weight_all": lambda: WeightConstraint(energy=0.9, trainable="all", restore_every_n_steps=2),
    "weight_update": lambda: WeightConstraint(energy=0.9, projection="update"),
    "activation": lambda: ActivationConstraint(strength=5, n_latents=4, depths=[0.5], every_n_steps=1),
    "coupled": lambda: Composite(
        {
            "weight": WeightConstraint(energy=0.9, restore_every_n_steps=100),
            "activation": ActivationConstraint(strength=5, n_latents=4, depths=[0.5], every_n_steps=2),
        }
    ),
    "l2": lambda: L2(strength=3),
    "kl": lambda: KL(strength=2),
    "constrained_sft": lambda: ConstrainedSFT(beta=0.5),
    "ldifs": lambda: LDIFS(strength=3),
    "lisa": lambda: Lisa(safety_steps=1, user_steps=2, strength=1),
    "safegrad": lambda: SafeGrad(strength=1),
    "sppft": lambda: SPPFT(block=[0.0, 0.5]),
    "safelora": lambda: SafeLoRA(share=0.5, modules="all_linear", mode="exact", rank=4),
    "weight+safelora": lambda: Composite(
        {"weight": WeightConstraint(energy=0.9, restore_every_n_steps=100), "safelora": SafeLoRA(share=0.5)}
    ),
    "asft": lambda: AsFT(strength=2),
}
IN_TRAINER = [
    ("none", "qlora"),
    ("weight", "full"),
    ("weight", "lora"),
    ("weight", "qlora"),
    ("weight_all", "full"),
    ("weight_update", "lora"),
    ("activation", "full"),
    ("coupled", "full"),
    ("coupled", "qlora"),
    ("l2", "lora"),
    ("kl", "qlora"),
    ("constrained_sft", "lora"),
    ("ldifs", "qlora"),
    ("lisa", "full"),
    ("safegrad", "lora"),
    ("sppft", "full"),
    ("safelora", "full"),
    ("safelora", "lora"),
    ("weight+safelora", "full"),
    ("asft", "lora"),
]
IN_LIGHTNING = [
    ("none", "full"),
    ("weight", "full"),
    ("weight", "qlora"),
    ("weight_update", "full"),
    ("activation", "qlora"),
    ("coupled", "lora"),
    ("l2", "qlora"),
    ("kl", "full"),
    ("constrained_sft", "qlora"),
    ("ldifs", "lora"),
    ("lisa", "lora"),
    ("safegrad", "qlora"),
    ("sppft", "qlora"),
    ("safelora", "qlora"),
    ("asft", "full"),
]
TUNING = {"full": FULL, "lora": LORA, "qlora": QLORA}
IDS = torch.arange(20, 60)[None]
STEPS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The start, and the features of an activation constraint for it."""
    made = tmp_path_factory.mktemp("start")
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


def trainer_of(model, output, rows=ROWS, **more):
    chat = tiny.chat()
    encoded = [chat.encode(*row) for row in rows]
    table = datasets.Dataset.from_dict(
        {
            "input_ids": [row.input_ids for row in encoded],
            "attention_mask": [[1] * len(row.input_ids) for row in encoded],
            "labels": [row.labels for row in encoded],
        }
    )
    settings = {
        "max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "weight_decay": 0.1,
        "lr_scheduler_type": "constant", "use_cpu": True, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "logging_strategy": "no", "seed": 0,
    }  # fmt: skip
    return Trainer(
        model, TrainingArguments(output_dir=str(output), **(settings | more)), train_dataset=table, eval_dataset=table,
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
        return PeftModel.from_pretrained(start(folder, way), saved)


def leak_of(folder, way, model):
    """Return ``||dW V|| / ||dW||`` of a model in float32 against its start, both as they are held."""
    begin, chat = start(folder, way), tiny.chat()
    prompts = [chat.prompt_ids(prompt) for prompt in PROMPTS]
    held = dict(leading(begin, prompts, ACTIVE["weight"]().requirements.subspace, chat.pad_id))
    sums = torch.zeros(2, dtype=torch.float64)
    for before, after in zip(linears(begin, "all_linear"), linears(model, "all_linear"), strict=True):
        moved = dense(after.module) - dense(before.module)
        factors = after.factors()
        delta = moved if factors is None else factors[0].detach() @ factors[1].detach()
        sums += torch.tensor(linalg.leak(delta, held[before.site.name].basis.float()), dtype=torch.float64)
    return float((sums[0] / sums[1]).sqrt())


class Seen(TrainerCallback):
    """What the model computes after the second step as it is trained, and as it would be used."""

    def __init__(self, defense):
        self.defense, self.raw, self.kept = defense, None, None

    def on_step_end(self, args, state, control, model, **_):
        if state.global_step != 2:
            return
        self.raw = logits(model)
        trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        self.defense.settle(model)
        self.kept = logits(model)
        with torch.no_grad():
            for name, value in trained.items():
                model.get_parameter(name).copy_(value)


@pytest.mark.parametrize(("name", "way"), IN_TRAINER)
def test_a_trainer_saves_the_model_that_is_used_and_trains_on_as_it_was(name, way, folder, tmp_path):
    ends = {}
    for saving in ("no", "steps"):
        defense = ACTIVE[name]()
        trainer = trainer_of(adapted(folder, way), tmp_path, save_strategy=saving, save_steps=2, save_only_model=True)
        protected = put_under(trainer, defense, folder)
        seen = Seen(defense)
        if saving == "steps":
            trainer.add_callback(seen)
        trainer.train()
        ends[saving] = weights(trainer.model)
    assert same(*ends.values())
    on_the_way = loaded(folder, way, tmp_path / "checkpoint-2")
    torch.testing.assert_close(logits(on_the_way), seen.kept, atol=1e-5, rtol=1e-4)
    settles = "safelora" in name or (way == "full" and name in ("weight", "coupled"))
    assert torch.allclose(seen.raw, seen.kept, atol=1e-5) is not settles
    final = logits(trainer.model)
    trainer.save_model(str(tmp_path / "final"))
    end = loaded(folder, way, tmp_path / "final")
    torch.testing.assert_close(logits(end), final, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(final, logits(start(folder, way)), atol=1e-3)
    if "weight" in name or name == "coupled":
        assert leak_of(folder, way, on_the_way) < 3e-6
        assert leak_of(folder, way, end) < 3e-6
    if way == "full":
        return
    plain = protected.merged()
    # In 4 bits PEFT computes in bfloat16 beside the factors.
    close = {"atol": 3e-2, "rtol": 3e-2} if way == "qlora" else {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(logits(plain), final, **close)
    trainer.save_model(str(tmp_path / "merged"))
    again = loaded(folder, "full", tmp_path / "merged")
    assert again.dtype == torch.float32
    torch.testing.assert_close(logits(again), logits(plain))
    if "weight" in name or name == "coupled":
        real = leak_of(folder, way, again)
        assert 0 < real < 1e-5
        assert defense.summary()["leak"] == pytest.approx(real, rel=1e-3)


@pytest.mark.parametrize(("name", "way"), IN_LIGHTNING)
def test_the_own_loop_resumes_as_it_trained_and_exports_what_it_measured(name, way, tmp_path):
    settings = {"tuning": TUNING[way], "rows": ROWS[:16], "checkpoint_every_n_steps": 2}
    defense = ACTIVE[name]()
    model, _ = train(defense, **settings)
    checkpoint = tmp_path / "checkpoint"
    with pytest.raises(Killed):
        train(ACTIVE[name](), **settings, checkpoint=checkpoint, callbacks=[Kill(2)])
    assert Resume(checkpoint).step == 2
    assert same(weights(train(ACTIVE[name](), **settings, checkpoint=checkpoint)[0]), weights(model))
    model.save_pretrained(tmp_path / "out")
    assert same(weights(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)), weights(model))
    assert defense.summary().get("leak", 0) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_leak_that_is_told_is_that_of_the_merged_model(dtype, folder, tmp_path):
    """Rounded to bfloat16, as PEFT merges, the same update would leak tens of thousands of times as much."""
    begin = start(folder, "full").to(dtype)
    reference = weights(begin)
    model = get_peft_model(begin, LoraConfig(r=3, lora_alpha=6, target_modules=["down_proj", "q_proj"]))
    defense = WeightConstraint(energy=0.9)
    trainer = trainer_of(model, tmp_path)
    protected = put_under(trainer, defense, folder)
    trainer.train()
    merged = weights(protected.merged())
    assert {value.dtype for value in merged.values()} == {torch.float32}
    sums, rounded = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for held in defense._held:
        if held.linear.adapter is None:
            continue
        name, basis = held.linear.name, held.basis.float()
        sums += torch.tensor(linalg.leak(merged[name] - reference[name].float(), basis), dtype=torch.float64)
        to_bits = merged[name].bfloat16().float()
        rounded += torch.tensor(linalg.leak(to_bits - reference[name].float(), basis), dtype=torch.float64)
    real = float((sums[0] / sums[1]).sqrt())
    assert defense.summary()["leak"] == pytest.approx(real, rel=1e-3)
    assert 0 < real < 1e-5
    assert float((rounded[0] / rounded[1]).sqrt()) > 1e-3
    assert trainer.model is protected.merged()


def test_the_best_checkpoint_is_loaded_into_a_projected_adapter(folder, tmp_path):
    trainer = trainer_of(
        adapted(folder, "lora"), tmp_path, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True,
    )  # fmt: skip
    put_under(trainer, WeightConstraint(energy=0.9), folder)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best.endswith("checkpoint-1")  # the largest loss is that of the first
    torch.testing.assert_close(logits(trainer.model), logits(loaded(folder, "lora", best)), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(
        logits(trainer.model), logits(loaded(folder, "lora", tmp_path / "checkpoint-3")), atol=1e-3
    )


@pytest.mark.parametrize("name", ["weight", "kl"])
def test_a_second_training_and_a_resumed_one_are_one_line(name, folder, tmp_path):
    trainer = trainer_of(adapted(folder, "full"), tmp_path, save_strategy="steps", save_steps=2)
    put_under(trainer, ACTIVE[name](), folder)
    trainer.train()
    kept = weights(trainer.model)
    with pytest.raises(LabError, match=r"protect: train\(\) once more.*accepted: one train\(\) with all epochs"):
        trainer.train()
    assert same(weights(trainer.model), kept)
    with pytest.raises(LabError, match="protect: the run goes on at step 2"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with pytest.raises(LabError, match=r"protect: train\(\) once more"):  # what was loaded is no start either
        trainer.train()
    with pytest.raises(LabError, match="protect: the trainer is under a defence"):
        put_under(trainer, ACTIVE[name](), folder)


REFUSED = [
    ("none", "lora", {}, "lively", "protect: lora_B=not zero: accepted: new adapters"),
    ("none", "lora", {"modules_to_save": ["lm_head"]}, "", "protect: what trains=lm_head.*LoRA's factors alone"),
    ("none", "lora", {"use_dora": True}, "", "protect: use_dora=True"),
    ("weight", "lora", {}, "bf16", "protect: dtype of lora_A=torch.bfloat16: accepted: float32 factors"),
    ("safelora", "qlora", {}, "", "protect: model=quantised: accepted: weights in bfloat16 or float32"),
    ("safelora", "full", {}, "best", "protect: load_best_model_at_end=True: accepted: False"),
    ("weight", "full", {}, "trained", "protect: the trainer has trained"),
    ("weight", "full", {}, "init", "protect: model_init="),
    ("kl", "full", {}, "stream", "protect: train_dataset=IterableDataset: accepted: one with a length"),
]


@pytest.mark.parametrize(("name", "way", "more", "change", "line"), REFUSED)
def test_what_cannot_be_held_is_one_line(name, way, more, change, line, folder, tmp_path):
    model = adapted(folder, way, **more)
    if change == "lively":
        next(p for n, p in model.named_parameters() if "lora_B" in n).data.fill_(0.1)
    if change == "bf16":
        model.bfloat16()
    best = {"load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "no"} if change == "best" else {}
    trainer = trainer_of(model, tmp_path)
    for key, value in best.items():
        setattr(trainer.args, key, value)
    if change == "trained":
        trainer.train()
    if change == "init":
        trainer.model_init = tiny.model
    if change == "stream":
        trainer.train_dataset = trainer.train_dataset.to_iterable_dataset()
    with pytest.raises(LabError, match=line):
        put_under(trainer, ACTIVE[name](), folder)


FEATURES = [
    ("lower", WIDE, r"protect: features=.*lower \(layers \[0\]\): accepted: those of layers \[1\]"),
    ("fewer", WIDE, r"protect: features=.*\(3 latents\): accepted: n_latents=4"),
    ("features", {"hidden_size": 32}, r"protect: features=.*\(width 64\): accepted: those of a model of width 32"),
    ("features", {"seed": 5, **WIDE}, r"protect: features=.*residuals are 1\d\d% off this one's\): accepted: those of"),
]


@pytest.mark.parametrize(("made", "changes", "line"), FEATURES)
def test_features_of_another_layer_size_or_model_are_one_line(made, changes, line, folder, tmp_path):
    trainer = trainer_of(tiny.model(**changes), tmp_path)
    with pytest.raises(LabError, match=line):
        protect(trainer, ACTIVE["activation"](), harmful=PROMPTS, features=folder / made)


def test_features_hold_for_their_model_in_few_bits_and_not_without_their_mark(folder, tmp_path):
    for way in ("full", "qlora"):
        model = adapted(folder, way)
        model = model.bfloat16() if way == "full" else model
        protect(trainer_of(model, tmp_path), ACTIVE["activation"](), harmful=PROMPTS, features=folder / "features")
    from safetensors.torch import load_file, save_file

    (tmp_path / "old").mkdir()
    for path in (folder / "features").iterdir():
        (tmp_path / "old" / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "old" / "layer1.safetensors")
    del tensors["signature"]
    save_file(tensors, tmp_path / "old" / "layer1.safetensors")
    with pytest.raises(LabError, match="older than the mark of their model"):
        protect(
            trainer_of(adapted(folder, "full"), tmp_path), ACTIVE["activation"](), harmful=PROMPTS,
            features=tmp_path / "old",
        )  # fmt: skip
