import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from cwac_lab import align, evaluate, prepare, tables, train
from cwac_lab.config.run import read
from cwac_lab.core import cli
from cwac_lab.core.errors import ConfigError, LabError
from cwac_lab.core.paths import conf_dir
from cwac_lab.models import adapters
from support import tiny
from support.cover import some

GROUPS = (
    "model",
    "task",
    "data",
    "constraint",
    "forms",
    "sae",
    "tuning",
    "trainer",
    "logger",
    "profile",
    "experiment",
    "search",
)
OPTIONS = [
    (group, file.stem) for group in GROUPS for file in sorted((conf_dir() / group).glob("*.yaml"))
]  # fmt: skip
LOCAL = f"data.root={Path(__file__).parent}"


def overrides(group, option):
    chosen = [f"{group}={option}"]
    if option in ("local", "sst2_drift", "vendor_drift", "hard_steps", "hard_rate", "field"):
        chosen.append(LOCAL)
    if option == "chat":
        chosen.append("task.train=rows.jsonl")
    return chosen


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=lambda value: str(value))
def test_every_yaml_composes_and_binds(group, option):
    run = read(tiny.config(*overrides(group, option)))
    assert run.model.name


UNTUNED = {"none", "sft_plus_refusals"}
TUNED = sorted(file.stem for file in (conf_dir() / "constraint").glob("*.yaml") if file.stem not in UNTUNED)


def choices_of(method):
    """Return the lists of overrides that a method is tuned over."""
    space = yaml.safe_load((conf_dir() / f"search/{method}.yaml").read_text())["hydra"]["sweeper"]["params"]
    return [[f"{key}={choice}" for choice in split_choices(text)] for key, text in space.items()]


@pytest.mark.parametrize("method", TUNED)
def test_every_method_has_the_same_budget_of_trials(method):
    assert len(set(itertools.product(*choices_of(method)))) == 4


@pytest.mark.parametrize("method", some(TUNED, "coupled"))
def test_every_trial_is_another_run_of_its_method(method):
    choices = choices_of(method)
    trials = [read(tiny.config(f"search={method}", *trial)) for trial in itertools.product(*choices)]
    assert len({str(run.resolved) for run in trials}) == 4
    assert {run.evaluation.split for run in trials} == {"validation"}
    default = read(tiny.config(f"constraint={method}"))
    assert {run.constraint_name for run in trials} == {default.constraint_name}


def split_choices(text):
    (override,) = OverridesParser.create().parse_overrides([f"x={text}"])
    return [choice.text if isinstance(choice, QuotedString) else choice for choice in override.value().list]


# There is no small Mistral on the hub: asking for it is among the bad inputs below.
MODELS = [
    (model, profile)
    for model in ("llama2", "llama3", "mistral", "gemma", "qwen", "smollm")
    for profile in ("embedded", "small", "paper")
    if (model, profile) != ("mistral", "small")
]


@pytest.mark.parametrize(("model", "profile"), MODELS)
def test_models_compose_with_profiles(model, profile):
    config = tiny.config(f"model={model}", f"profile={profile}")
    run = read(config)
    assert (run.model.align == "none") == (profile != "embedded")


def test_the_papers_profile_is_the_papers_setting():
    run = read(tiny.config("profile=paper", "model=llama2"))
    assert (run.data.n_train, run.trainer.epochs, run.trainer.learning_rate) == (5000, 3, 2e-5)
    assert (run.trainer.max_length, run.trainer.precision, run.trainer.batch_size) == (512, "bf16-mixed", 1)
    assert run.evaluation.max_new_tokens == 512
    hubs = {name: yaml.safe_load((conf_dir() / f"model/{name}.yaml").read_text())["weights"]["paper"]["hub"]
            for name in ("llama2", "llama3", "mistral", "gemma", "qwen")}  # fmt: skip
    assert hubs == {
        "llama2": "meta-llama/Llama-2-7b-chat-hf",
        "llama3": "meta-llama/Meta-Llama-3-8B-Instruct",
        "mistral": "mistralai/Mistral-7B-Instruct-v0.3",
        "gemma": "google/gemma-2-9b-it",
        "qwen": "Qwen/Qwen2.5-7B-Instruct",
    }


BAD = [
    (["harmful_ratio=1.5"], "harmful_ratio=1.5: accepted: a number in [0, 1]"),
    (["harmful_ratio=much"], "harmful_ratio=much: accepted: a number"),
    (["seed=-1"], "seed=-1: accepted"),
    (
        ["constraint=[weight,ema]", "constraint.weight.tail=slowed", "constraint.weight.tail_energy=1"],
        "constraint.weight.tail=slowed: accepted: free | penalised beside ema: a tail is slowed from the last weights",
    ),
    (["constraint=pgm", "trainer.precision=bf16-true"], "bf16-true: accepted: 32-true | bf16-mixed: bf16 weights"),
    (["constraint=[osf,pgm]"], "constraint.pgm.norm=mars: accepted: frobenius beside osf, which holds what an update"),
    (
        ["constraint=[weight,osf]"],
        "constraint=[osf,weight]: accepted: one of osf | weight: each moves what another holds",
    ),
    (
        ["constraint=safe_delta", "tuning=lora", "tuning.save=adapter"],
        "tuning.save=adapter: accepted: merged with constraint=safe_delta, which changes merged weights",
    ),
    (["constraint=safe_delta", "tuning=lora", "guard.kl=0.1"], "guard.kl=0.1: accepted: null, or tuning=full, with"),
    (
        ["constraint=safe_delta", "tuning=lora", "evaluation.every_n_steps=2"],
        "evaluation.every_n_steps=2: accepted: 0, or tuning=full, with constraint=safe_delta",
    ),
    (
        ["constraint=safe_delta", "tuning=lora", "diagnostics.enabled=true", "diagnostics.every_n_steps=2"],
        "diagnostics.every_n_steps=2: accepted: 0, or tuning=full, with constraint=safe_delta",
    ),
    (
        ["constraint=[weight,osf]", "constraint.weight.projection=gradient", "tuning=lora"],
        "constraint=[osf,weight]: accepted: one of osf | weight: each moves what another holds",
    ),
    (["task=imdb"], "task=imdb: accepted: agnews | alpaca | chat | gsm8k | pubmedqa | sst2"),
    (["model=gpt"], "model=gpt: accepted: gemma | llama2"),
    (["constraint=magic"], "constraint=magic: accepted: activation | asft | "),
    (["~align"], "align=: accepted: a value (it has no default)"),
    (["no_such_key=1"], "no_such_key: no such key; accepted: "),
    (["trainer.lr=1"], "trainer.lr: no such key; accepted: accelerator, "),
    (["+trainer.lr=1"], "trainer.lr=1: accepted: one of the keys "),
    (["trainer.learning_rate=0"], "trainer.learning_rate=0"),
    (["trainer.learning_rate=fast"], "trainer.learning_rate=fast: accepted"),
    (["trainer.schedule=zigzag"], "trainer.schedule=zigzag: accepted: constant | "),
    (["constraint.weight.modules=heads"], "constraint.weight.modules=heads: accepted: ffn_out | "),
    (["constraint.weight.rank=3"], "constraint.weight.rank=3: accepted: exactly one of"),
    (["constraint.activation.depths=[1.0]"], "constraint.activation.depths=[1.0]: accepted"),
    (["constraint.activation.answer_tokens=-1"], "answer_tokens=-1: accepted: a number in [0, inf)"),
    (
        ["constraint.activation.answer_tokens=2", "constraint.activation.positions=all"],
        "constraint.activation.answer_tokens=2: accepted: 0 with positions=all",
    ),
    (["constraint.activation.n_latents=9999"], "sae.n_latents=4608: accepted: >= 9999"),
    (["constraint.weight._target_=os.system"], "constraint.weight._target_=os.system: accepted: the path of a Defense"),
    (["+constraint.strength=1"], "constraint.strength=1: accepted: the settings of a defence"),
    (["+constraint.mine.strength=1"], "constraint.mine._target_=: accepted: the path of a Defense"),
    (["constraint=weight", "data.harmful.reference.requests=0"], "data.harmful.reference=0: accepted: >= 1"),
    (["constraint=activation", "data.harmless.reference.instructions=0"], "data.harmless.reference=0"),
    (["constraint=constrained_sft", "constraint.constrained_sft.first_factor=0"], "first_factor=0.0: accepted: "),
    (["harmful_ratio=1", "data.n_train=1000"], "harmful_ratio=1.0: accepted: at most"),
    (["data.harmful.test={nolist: 3}"], "data.harmful.test"),
    (["data.reference=some"], "data.reference=some: accepted: refused | all"),
    (["+data.lists.requests.nmae=a"], "data.lists.requests.nmae=a: accepted: one of the keys name, split"),
    (
        ["forms=varied", "forms.others.servant.prefix="],
        "forms.others.servant.prefix=: accepted: a prefix, a template, or",
    ),
    (["+forms.others.mine.template='{%'"], "forms.others.mine.template={%: accepted: a Jinja chat template"),
    (["+forms.others.mine.template=hello"], "forms.others.mine.template=hello: accepted: a chat template that asks"),
    (["attack.template='{{ messages[4].content }}'"], "attack.template={{ messages[4].content }}: accepted: a Jinja"),
    (["+forms.others.mine.words=a"], "forms.others.mine.words=a: accepted: one of the keys prefix"),
    (["+forms.others.mine.prefix=a"], "forms.name=own: accepted: a name of its own for tables"),
    (["+forms.others.system.prefix=a"], "forms.others=system: accepted: another name: own and system are taken"),
    (["+forms.others.mine.system=''"], "forms.others.mine.prefix=: accepted: a prefix, a template, or a system"),
    (["forms=varied", "constraint=lisa"], "forms=varied: accepted: own with constraint=lisa, which holds on to no"),
    (["constraint.weight.held_on=none"], "constraint.weight.held_on=none: accepted: harmful | both"),
    (["constraint.activation.held_on=none"], "constraint.activation.held_on=none: accepted: harmful | both"),
    (["data=local"], "data.root=None: accepted: an existing folder"),
    (["model.path=/nowhere"], "model.path=/nowhere: accepted: a folder with config.json"),
    (["model=mistral", "profile=small"], "profile=small: accepted: for model=mistral: embedded | paper"),
    (["seed="], "seed"),
    (["trainer.precision=bf16-true"], "trainer.precision=bf16-true: accepted: 32-true"),
    (["trainer.devices=9"], "trainer.devices=9: accepted: at most trainer.batch_size=8"),
    (["trainer.strategy=zero3"], "trainer.strategy=zero3: accepted: ddp | fsdp"),
    (["trainer.strategy=fsdp", "constraint=safegrad"], "trainer.strategy=fsdp: accepted: ddp with constraint=safegrad"),
    (["tuning=ia3"], "tuning=ia3: accepted: full | lora | qlora"),
    (["tuning=lora", "tuning.base=int8"], "tuning.base=int8: accepted: float32 | bfloat16 | nf4"),
    (["tuning.rank=4"], "tuning.rank: no such key; accepted: method"),
    (["tuning=lora", "tuning.rank=0"], "tuning.rank=0: accepted: a number in [1, inf)"),
    (["tuning=lora", "tuning.modules=heads"], "tuning.modules=heads: accepted: query_value | ffn_out | "),
    (
        ["tuning=lora", "constraint=none", "trainer.precision=bf16-true"],
        "trainer.precision=bf16-true: accepted: 32-true",
    ),
    (["tuning=lora", "tuning.modules=ffn", "constraint=asft"], "constraint.asft.modules=attention: accepted: a scope"),
    (["evaluation.n_prompts=0"], "evaluation.n_prompts=0: accepted: a number in [1, inf)"),
    (["evaluation.split=train"], "evaluation.split=train: accepted: test | validation"),
    (["'bad override"], "bad override"),
]


@pytest.mark.parametrize(("arguments", "expected"), BAD, ids=lambda value: " ".join(value)[:60])
def test_bad_input_is_told_in_one_line(arguments, expected):
    with pytest.raises((LabError, HydraException, OmegaConfBaseException)) as raised:
        read(cli.compose(arguments))
    line = cli._one_line(raised.value)
    assert expected in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("entry", "arguments", "expected"),
    [
        pytest.param(entry, *case, marks=() if place % 9 == 0 else pytest.mark.exhaustive, id=f"{name}-{place}")
        for place, case in enumerate(BAD)
        for name, entry in (("train", train), ("prepare", prepare))
        if entry is train or place % 9 == 0  # both read alike
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(entry, arguments, expected, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, err = call(entry.main, "config", arguments, monkeypatch, capsys)
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert expected in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_configuration_is_read_without_what_training_needs():
    """Which takes seconds to import; a process of its own, as this one has imported it."""
    late = ("lightning", "peft", "transformers", "scipy")
    asked = f"import sys, cwac_lab.config.run, cwac_lab.train; print([name for name in {late} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", asked], check=True, capture_output=True).stdout == b"[]\n"


def call(main, name, arguments, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["cwac_lab", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.launch(main, name)
    return stopped.value.code, capsys.readouterr().err


def test_a_missing_package_is_one_line(monkeypatch, capsys, tmp_path):
    import importlib.metadata

    import cwac_lab.run.execution  # noqa: F401  what it imports asks for versions of its own

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("cwac_lab.models.packaged.importlib.metadata.version", absent)
    code, err = call(align.main, "config", [f"output_root={tmp_path}"], monkeypatch, capsys)
    assert code == 2
    assert "make setup" in err
    assert err.count("\n") == 1


def test_an_unreachable_hub_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    code, err = call(
        align.main,
        "config",
        ["profile=small", "data=embedded", "data.n_train=50", f"output_root={tmp_path}"],
        monkeypatch,
        capsys,
    )
    assert code == 2
    assert "model.weights.small.hub=HuggingFaceTB/SmolLM2-135M-Instruct: " in err
    assert err.count("\n") == 1


def test_evaluate_needs_a_run(monkeypatch, capsys, tmp_path):
    code, err = call(evaluate.main, "evaluate", [f"run={tmp_path}"], monkeypatch, capsys)
    assert code == 2
    assert "config.json" in err
    code, err = call(evaluate.main, "evaluate", [], monkeypatch, capsys)
    assert code == 2
    assert "run" in err


def test_tables_need_runs(monkeypatch, capsys, tmp_path):
    code, err = call(tables.main, "tables", [f"output_root={tmp_path}"], monkeypatch, capsys)
    assert code == 2
    assert err.count("\n") == 1


@pytest.mark.parametrize("target", ["train", "align", "prepare", "evaluate", "tables", "benchmark"])
def test_what_make_runs_composes(target):
    root = conf_dir().parent
    # Under `make test ARGS=...` these would be options of this make as well.
    plain = {name: value for name, value in os.environ.items() if name not in ("ARGS", "MAKEFLAGS", "MAKEOVERRIDES")}
    command = ["make", "-n", target]
    shown = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True, env=plain).stdout
    (command,) = [line.split() for line in shown.splitlines() if "-m cwac_lab." in line]
    module, overrides = command[2].removeprefix("cwac_lab."), command[3:]
    cli.compose(overrides, module if (conf_dir() / f"{module}.yaml").is_file() else "config")


@pytest.mark.parametrize(
    ("key", "value", "accepted"),
    [
        ("trainer", 5, "a mapping of settings"),
        ("align", None, "a mapping of settings"),
        ("task", None, "a mapping of settings"),
        ("constraint", [1], "a mapping of settings"),
        ("trainer", {"learning_rate": b"ab"}, "text, numbers, lists and mappings"),
    ],
)
def test_a_group_that_is_no_mapping_of_plain_settings_is_one_line(key, value, accepted):
    config = tiny.config()
    config[key] = value
    with pytest.raises(ConfigError, match=rf"{key}=.*: accepted: {accepted}"):
        read(config)


def test_what_is_read_twice_is_not_shared():
    one, other = (read(tiny.config("constraint=activation", "constraint.activation.depths=[0.5]")) for _ in range(2))
    one.constraint.parts["activation"].depths.append(0.9)
    one.data.harmful["test"].clear()
    assert other.constraint.parts["activation"].depths == [0.5]
    assert other.data.harmful["test"]
    assert read(tiny.config("constraint=activation", "constraint.activation.depths=[0.5]")).data == other.data


def test_4_bits_need_bitsandbytes(monkeypatch):
    assert read(tiny.config("tuning=qlora")).dtype == torch.bfloat16
    assert read(tiny.config("tuning=qlora", "finetune=false")).dtype == torch.float32
    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"tuning.base=nf4: accepted: float32 \| bfloat16, or bitsandbytes: pip"):
        read(tiny.config("tuning=qlora"))
