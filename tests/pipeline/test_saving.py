"""What is saved, kept on the way, loaded again and merged is the model that was trained, and under its constraint.

Every defence occurs under Hugging Face's trainer and the own loop, every way of tuning with both, and each kind of
defence under TRL's trainer; not every combination.
"""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, TrainerCallback

from cwac_lab.core import linalg
from cwac_lab.core.errors import LabError
from cwac_lab.defenses.cwac.subspace.basis import leading
from cwac_lab.defenses.cwac.weight import WeightConstraint
from cwac_lab.models.few_bits import dense, keep_layout
from cwac_lab.models.sites import linears
from cwac_lab.training.checkpoint import Resume
from support import tiny
from support.cover import some
from support.held import FULL, LORA, PROMPTS, QLORA, ROWS, Kill, Killed, same, train, weights
from support.others import ACTIVE, adapted, loaded, logits, put_under, start, start_folder, trainer_of

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
    ("ema", "full"),
    ("ema", "lora"),
]
IN_SFT = [
    ("none", "lora"),
    ("weight", "full"),
    ("weight", "lora"),
    ("coupled", "lora"),
    ("kl", "full"),
    ("lisa", "lora"),
    ("safelora", "full"),
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
    ("ema", "lora"),
]
# For the fast set: every way of tuning, and each kind of defence once.
FEW_IN_TRAINER = (
    ("weight", "full"),
    ("weight", "qlora"),
    ("weight_update", "lora"),
    ("coupled", "qlora"),
    ("lisa", "full"),
    ("safelora", "full"),
    ("ema", "lora"),
)
FEW_IN_SFT = (("weight", "full"), ("weight", "lora"))
FEW_IN_LIGHTNING = (("weight", "qlora"), ("coupled", "lora"), ("kl", "full"), ("lisa", "lora"), ("safelora", "qlora"))
TRAINERS = [
    *some([("Trainer", *row) for row in IN_TRAINER], *(("Trainer", *row) for row in FEW_IN_TRAINER)),
    *some([("SFTTrainer", *row) for row in IN_SFT], *(("SFTTrainer", *row) for row in FEW_IN_SFT)),
    *some([("SFTTrainer in bf16", "weight", "lora")], others="slow"),
]
TUNING = {"full": FULL, "lora": LORA, "qlora": QLORA}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return start_folder(tmp_path_factory.mktemp("start"))


def leak_of(folder, way, model):
    """Return ``||dW V|| / ||dW||`` of a model in float32 against its start, both as they are held."""
    begin, chat = start(folder, way), tiny.chat()
    keep_layout(begin)  # another one has other scales
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


@pytest.mark.parametrize(("kind", "name", "way"), TRAINERS)
def test_a_trainer_saves_the_model_that_is_used_and_trains_on_as_it_was(kind, name, way, folder, tmp_path):
    ends = {}
    for saving in ("no", "steps"):
        defense = ACTIVE[name]()
        saved = {"save_strategy": saving, "save_steps": 2, "save_only_model": True}
        trainer = trainer_of(adapted(folder, way), tmp_path, kind=kind, **saved)
        protected = put_under(trainer, defense, folder)
        seen = Seen(defense)
        if saving == "steps":
            trainer.add_callback(seen)
        trainer.train()
        ends[saving] = weights(trainer.model)
    assert same(*ends.values())
    on_the_way = loaded(folder, way, tmp_path / "checkpoint-2")
    # In bf16 what the trainer's model computes is rounded, and its weights are not.
    near = {"atol": 2e-2, "rtol": 2e-2} if "bf16" in kind else {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(logits(on_the_way), seen.kept, **near)
    settles = "safelora" in name or name == "ema" or (way == "full" and name in ("weight", "coupled"))
    assert torch.allclose(seen.raw, seen.kept, atol=1e-5) is not settles
    final = logits(trainer.model)
    trainer.save_model(str(tmp_path / "final"))
    end = loaded(folder, way, tmp_path / "final")
    torch.testing.assert_close(logits(end), final, **near)
    assert not torch.allclose(final, logits(start(folder, way)), atol=5e-2)
    if "weight" in name or name == "coupled":
        assert leak_of(folder, way, on_the_way) < 3e-6
        assert leak_of(folder, way, end) < 3e-6
    if way == "full":
        return
    plain = protected.merged()
    # In 4 bits PEFT computes in bfloat16 beside the factors.
    close = {"atol": 3e-2, "rtol": 3e-2} if way == "qlora" else near
    torch.testing.assert_close(logits(plain), final, **close)
    trainer.save_model(str(tmp_path / "merged"))
    again = loaded(folder, "full", tmp_path / "merged")
    assert again.dtype == torch.float32
    torch.testing.assert_close(logits(again), logits(plain))
    if "weight" in name or name == "coupled":
        real = leak_of(folder, way, again)
        assert 0 < real < 1e-5
        assert defense.summary()["leak"] == pytest.approx(real, rel=1e-3)


@pytest.mark.parametrize(("name", "way"), some(IN_LIGHTNING, *FEW_IN_LIGHTNING))
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
        name, basis = held.linear.name, held.span.basis.float()
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
