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
from support.bad_input import BAD
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


@pytest.mark.parametrize(
    ("chosen", "rate"),
    [
        ([], 3e-4),
        (["model=gemma"], 3e-4),
        (["model=qwen_coder"], 1e-4),
        (["model=qwen_coder", "model.align=refusals"], 3e-4),
        (["model.path=a"], 1e-4),
        (["experiment=sst2_drift", LOCAL], 1e-4),
        (["experiment=sst2_drift", "profile=small"], 2e-5),
        (["experiment=hard_rate", "profile=small"], 4e-4),
        (["profile=small"], 2e-5),
        (["model.path=a", "trainer.learning_rate=1"], 1),
    ],
)
def test_the_rate_is_that_of_the_start(chosen, rate):
    assert cli.compose(chosen).trainer.learning_rate == rate


@pytest.mark.parametrize("both", [("hard_steps", "hard_rate"), ("hard_rate", "hard_steps")])
def test_two_experiments_are_both_followed_in_any_order(both):
    trainer = cli.compose([f"experiment=[{','.join(both)}]", LOCAL]).trainer
    assert (trainer.epochs, trainer.learning_rate) == (6, 4e-4)


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
