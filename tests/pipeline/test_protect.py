"""What a defence cannot hold in another trainer, or was not made for, is one line before anything trains."""

import pytest
from safetensors.torch import load_file, save_file

from cwac_lab.core.errors import LabError
from cwac_lab.integrations import protect
from support import tiny
from support.held import PROMPTS, WIDE
from support.others import ACTIVE, adapted, put_under, start_folder, trainer_of

REFUSED = [
    ("none", "lora", {}, "lively", "protect: lora_B=not zero: accepted: new adapters"),
    ("none", "lora", {"modules_to_save": ["lm_head"]}, "", "protect: what trains=lm_head.*LoRA's factors alone"),
    ("none", "lora", {"use_dora": True}, "", "protect: use_dora=True"),
    ("weight", "lora", {}, "bf16", "protect: dtype of lora_A=torch.bfloat16: accepted: float32 factors"),
    ("safelora", "qlora", {}, "", "protect: model=quantised: accepted: weights in bfloat16 or float32"),
    ("safe_delta", "lora", {}, "", "protect: model=with adapters: accepted: plain weights"),
    ("ema", "full", {}, "best", "protect: load_best_model_at_end=True: accepted: False"),
    ("safelora", "full", {}, "best", "protect: load_best_model_at_end=True: accepted: False"),
    ("weight", "full", {}, "trained", "protect: the trainer has trained"),
    ("weight", "full", {}, "init", "protect: model_init="),
    ("kl", "full", {}, "stream", "protect: train_dataset=IterableDataset: accepted: one with a length"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return start_folder(tmp_path_factory.mktemp("start"))


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
