import re
from pathlib import Path

import pytest
import torch

from cwac_lab import prepare
from cwac_lab.config.run import read
from cwac_lab.core.errors import QualityError
from cwac_lab.data.forms import Form
from cwac_lab.data.pools import build_pools
from cwac_lab.data.responses import refusal
from cwac_lab.data.sources import PromptRow, normalise
from cwac_lab.defenses.cwac.activation import ActivationConstraint
from cwac_lab.defenses.cwac.subspace.parts import Parts
from cwac_lab.defenses.cwac.subspace.spec import SubspaceSpec
from cwac_lab.evaluation.generate import Answer
from cwac_lab.models.capture import site_inputs
from cwac_lab.models.chat import ChatFormat
from cwac_lab.models.templates import Turn
from cwac_lab.run import artefacts, protected, start
from cwac_lab.run import references as module
from cwac_lab.run.references import References, forms_of, references
from support import families, tiny


def setting(tmp_path, tiny_folder, *overrides, constraint="weight"):
    small = (*tiny.small_run(tiny_folder, tmp_path), "sae.n_latents=128")
    run = read(tiny.config(*small, f"constraint={constraint}", *overrides))
    return run, build_pools(run.data)


def found(run, pools):
    return references(run, pools, "content", tiny.model(), tiny.chat(), lambda text: None)


def texts(pairs):
    return [tiny.chat().encode(*pair).input_ids for pair in pairs]


@pytest.fixture
def asked(monkeypatch):
    """The start model refuses every second prompt, of questions the others; what it was asked is noted."""
    seen = []

    def answer(model, chat, prompts, max_new_tokens, batch_size):
        seen.append([chat.tokenizer.decode(chat.prompt_ids(prompt)) for prompt in prompts])
        ended = max_new_tokens > 5
        refuses = [(i + text.startswith("Question: ")) % 2 for i, text in enumerate(seen[-1])]
        return [Answer("I can't help with that." if no else "Sure.", ended=ended, first=5) for no in refuses]

    monkeypatch.setattr(module, "answers", answer)
    return seen


def rendered(prompts):
    return [tiny.chat().tokenizer.decode(tiny.chat().prompt_ids(prompt)) for prompt in prompts]


@pytest.mark.parametrize("align", ["none", "refusals"])
def test_prompts_that_are_answered_are_left_out(align, asked, tmp_path, tiny_folder):
    run, pools = setting(
        tmp_path, tiny_folder, "data.reference=refused", f"model.align={align}", constraint="activation"
    )
    held = found(run, pools)
    reference, taught = pools.get("harmful", "reference"), pools.get("harmful", "alignment")
    assert held.harmful == reference[1::2]
    assert held.asked == len(reference)
    assert held.benign == pools.get("harmless", "reference")
    own = reference if align == "refusals" else reference + taught
    assert asked == [rendered(row.prompt for row in rows) for rows in (reference, taught)[: len(asked)]]
    assert len(asked) == (1 if align == "refusals" else 2)
    expected = texts([(row.prompt, "I can't help with that.") for row in own[1::2]])
    if align == "refusals":  # it was taught exactly these
        expected += texts([(row.prompt, refusal(row)) for row in taught])
    assert held.refusals == expected
    before = len(asked)
    assert found(run, pools) == held
    assert len(asked) == before  # the answers are cached


@pytest.mark.parametrize(
    ("constraint", "alignment"),
    [
        ("weight", False), ("activation", True), ("coupled", True), ("lisa", False), ("safegrad", False),
        ("safe_instruct", False), ("[weight,kl]", False),
    ],
)  # fmt: skip
def test_a_model_that_came_aligned_is_asked_what_is_used(constraint, alignment, asked, tmp_path, tiny_folder):
    """Of the refusals of the alignment pool an autoencoder is made, and nothing else."""
    run, pools = setting(
        tmp_path, tiny_folder, "data.reference=refused", "data.harmful.alignment.requests=9", constraint=constraint
    )
    held, every = found(run, pools), [row.prompt for row in pools.get("harmful", "alignment")]
    assert sum(len(prompts) for prompts in asked) == 6 + (9 if alignment else 0)
    refused = every[1::2] if alignment else []
    own = [row.prompt for row in held.harmful] + refused
    assert held.refusals == texts([(prompt, "I can't help with that.") for prompt in own])


def test_a_refusal_that_was_cut_has_no_end_of_turn(asked, tmp_path, tiny_folder):
    for longest, whole in ((6, True), (5, False)):
        run, pools = setting(
            tmp_path, tiny_folder, "data.reference=refused", "model.align=none", f"align.answer_tokens={longest}"
        )
        ends = {conversation[-1] == tiny.chat().end_id for conversation in found(run, pools).refusals}
        assert ends == {whole}


def test_all_prompts_can_be_held(asked, tmp_path, tiny_folder):
    for constraint, pool in (("coupled", "alignment"), ("weight", "none")):
        run, pools = setting(tmp_path, tiny_folder, "data.reference=all", constraint=constraint)
        held = found(run, pools)
        assert held.harmful == pools.get("harmful", "reference")
        assert held.refusals == texts([(row.prompt, refusal(row)) for row in held.harmful + pools.get("harmful", pool)])
    assert asked == []


PERSONA, QUESTION = "Obey me. ", "Question: {{ messages[0]['content'] }} Answer:"


@pytest.mark.parametrize("reference", ["refused", "all"])
def test_prompts_are_asked_and_held_in_other_forms_too(reference, asked, tmp_path, tiny_folder):
    forms = (
        "forms.name=mine",
        f"+forms.others.persona.prefix='{PERSONA}'",
        f'+forms.others.question.template="{QUESTION}"',
    )
    plain = found(*setting(tmp_path, tiny_folder, f"data.reference={reference}"))
    run, pools = setting(tmp_path, tiny_folder, f"data.reference={reference}", *forms)
    held, chat = found(run, pools), tiny.chat()
    every = pools.get("harmful", "reference")
    refused, other = (every[1::2], every[::2]) if reference == "refused" else (every, every)
    assert (held.harmful, held.benign, held.refusals) == (plain.harmful, plain.benign, plain.refusals)
    assert held.forms == {"persona": len(refused), "question": len(other)}
    for ids, own, question in (
        (held.harmful_ids, refused, other),
        (held.benign_ids, held.benign, held.benign),
    ):
        expected = [chat.prompt_ids(row.prompt) for row in own]
        expected += [chat.prompt_ids(PERSONA + row.prompt) for row in own]
        expected += [chat.tokens(f"Question: {row.prompt} Answer:") for row in question]
        assert ids == expected
    assert plain.harmful_ids == held.harmful_ids[: len(refused)]
    if reference == "refused":
        assert asked[1] == rendered(PERSONA + row.prompt for row in every)
        assert asked[2] == [chat.tokenizer.decode(chat.tokens(f"Question: {row.prompt} Answer:")) for row in every]


@pytest.mark.parametrize("reference", ["refused", "all"])
def test_prompts_are_held_under_the_system_prompt_of_the_rows_too(reference, asked, monkeypatch, tmp_path, tiny_folder):
    plain = found(*setting(tmp_path, tiny_folder, f"data.reference={reference}"))
    run, pools = setting(tmp_path, tiny_folder, f"data.reference={reference}")
    monkeypatch.setattr(type(run.task), "system", "Be brief.")
    held, every = found(run, pools), pools.get("harmful", "reference")
    kept = every[1::2] if reference == "refused" else every
    assert (held.harmful, held.benign, held.refusals) == (plain.harmful, plain.benign, plain.refusals)
    assert held.forms == {"system": len(kept)}
    for ids, own, more in ((held.harmful_ids, held.harmful, kept), (held.benign_ids, held.benign, held.benign)):
        under = [tiny.chat().prompt_ids([Turn("system", "Be brief."), Turn("user", row.prompt)]) for row in more]
        assert ids == [tiny.chat().prompt_ids(row.prompt) for row in own] + under
    if reference == "refused":
        assert asked[1] == rendered([Turn("system", "Be brief."), Turn("user", row.prompt)] for row in every)


def test_a_system_prompt_that_the_template_shows_anyway_is_not_held_twice(asked, monkeypatch, tmp_path, tiny_folder):
    chat = ChatFormat(families.tokenizer(families.FAMILIES["qwen2"]))
    run, pools = setting(tmp_path, tiny_folder)
    monkeypatch.setattr(type(run.task), "system", "You are a helpful assistant.")
    said = []
    held = references(run, pools, "content", tiny.model(), chat, said.append)
    assert held.forms == {"system": 0}
    assert "under the system prompt: is the model's own form, nothing is held twice" in said


def test_a_constraint_that_holds_on_to_no_prompt_has_no_form_of_its_own_accord(monkeypatch, tmp_path, tiny_folder):
    run, _ = setting(tmp_path, tiny_folder, constraint="lisa")
    monkeypatch.setattr(type(run.task), "system", "Be brief.")
    assert forms_of(run) == {}


def test_the_models_own_form_is_not_held_twice(asked, tmp_path, tiny_folder):
    run, pools = setting(tmp_path, tiny_folder)
    run.forms.others["same"] = Form(template=tiny.TEMPLATE)
    held = found(run, pools)
    assert held.forms == {"same": 0}
    assert len(held.harmful_ids) == len(held.harmful)


def test_a_form_in_which_nothing_is_refused_is_said(monkeypatch, tmp_path, tiny_folder):
    def answer(model, chat, prompts, max_new_tokens, batch_size):
        refuses = not prompts[0].startswith(PERSONA)
        return [Answer("I can't help with that." if refuses else "Sure.", ended=True, first=5) for _ in prompts]

    monkeypatch.setattr(module, "answers", answer)
    run, pools = setting(
        tmp_path, tiny_folder, "data.reference=refused", "forms.name=mine", f"+forms.others.persona.prefix='{PERSONA}'"
    )
    said = []
    held = references(run, pools, "content", tiny.model(), tiny.chat(), said.append)
    assert held.forms == {"persona": 0}
    assert len(held.benign_ids) == len(held.benign)
    assert "forms.others.persona: the start model refuses none of the 6 prompts, none is held" in said


def test_what_is_held_in_other_forms_reaches_both_constraints(tmp_path, tiny_folder):
    """Of all subspaces of a rank, the one of all forms leaves least of the inputs of the prompts in all forms."""
    small = tiny.small_run(tiny_folder, tmp_path)
    prepared = {}
    for forms in ("own", "varied"):
        run = read(
            tiny.config(
                *small,
                "constraint=coupled",
                "constraint.weight.energy=null",
                "constraint.weight.rank=8",
                "constraint.activation.n_latents=20",
                f"forms={forms}",
            )
        )
        begin = start.start(run, lambda text: None)
        prepared[forms] = artefacts.artefacts(run, begin, *begin.load(run), lambda text: None)
    (plain, told_plain), (varied, told) = prepared["own"], prepared["varied"]
    assert len(varied.benign) == len(plain.benign) * (1 + len(run.forms.others))
    for held_on, rows in (("harmful", varied.reference), ("both", varied.reference + varied.benign)):
        part = ActivationConstraint(n_latents=20, held_on=held_on)
        part.prepare(varied)
        assert len(part._start) == len(rows)
        assert all(len(latents) == len(varied.features) for latents in part._start)
    assert varied.reference[: len(plain.reference)] == plain.reference
    assert len(varied.reference) == len(plain.reference) + sum(told["reference"]["forms"].values())
    assert told["features"] == told_plain["features"]  # latents are chosen on the prompts as they are
    seen: dict[str, list[torch.Tensor]] = {}

    def receive(site, x):
        seen.setdefault(site.name, []).append(x[0])

    with torch.no_grad(), site_inputs(varied.model, "ffn_out", receive):
        for ids in varied.reference:
            varied.model(torch.tensor([ids]))
    assert len(seen) == 2
    for site, inputs in seen.items():
        x = torch.nn.functional.normalize(torch.cat(inputs))  # as C has them
        left = [context.subspace.spans[site].without(x) for context in (plain, varied)]
        assert left[1].square().sum() < 0.99 * left[0].square().sum()


def test_preparing_tells_what_is_held_of_every_form_and_of_the_prompts_to_come(tmp_path, tiny_folder, capsys):
    small = tiny.small_run(tiny_folder, tmp_path)
    tiny.launch(prepare.main, [*small, "constraint=weight", "forms=varied", "attack=template_shift"])
    said = " ".join(capsys.readouterr().out.split())
    shares = dict(re.findall(r"inputs within the subspace, (.+?): ([\d.]+)", said))
    held = ["as they stand", *read(tiny.config("forms=varied")).forms.others]
    to_come = [f"{kind} prompts of test as attack=template_shift asks" for kind in ("harmful", "harmless")]
    assert list(shares) == [*(f"harmful reference prompts, {name}" for name in held), *to_come]
    assert all(0.9 < float(share) <= 1 for share in shares.values())
    more = ["constraint.weight.energy=0.99", "data.harmless.test.instructions=0"]
    tiny.launch(prepare.main, [*small, "constraint=weight", *more])
    said = " ".join(capsys.readouterr().out.split())
    assert "harmful prompts of test as attack=mixed asks: 0.9" in said
    assert "harmless prompts of test" not in said


def test_no_form_is_one_that_an_attack_asks_in():
    folder = Path(__file__).parents[3] / "conf" / "attack"
    attacks = [read(tiny.config(f"attack={file.stem}")).attack for file in folder.glob("*.yaml")]
    prefixes = {normalise(attack.prefix) for attack in attacks if attack.prefix}
    templates = {normalise(attack.template) for attack in attacks if attack.template}
    assert prefixes
    assert templates
    chat = tiny.chat()
    for form in read(tiny.config("forms=varied")).forms.others.values():
        assert not any(prefix in normalise(form.prefix) for prefix in prefixes)
        assert normalise(form.template or "") not in templates
        other = chat if form.template is None else chat.with_template(form.template)
        asked = chat.tokenizer.decode(other.prompt_ids(form.prefix + "Why?"))
        answered = chat.tokenizer.decode(other.encode(form.prefix + "Why?", "So.").input_ids)
        assert "Why?" in asked
        assert "So." not in asked
        assert answered.startswith(asked)
        assert "So." in answered
        assert other.encode(form.prefix + "Why?", "So.").input_ids[-1] == other.end_id


def test_a_model_that_refuses_nothing_is_an_error(tmp_path, tiny_folder):
    run, pools = setting(tmp_path, tiny_folder, "data.reference=refused")
    with pytest.raises(QualityError, match=r"refuses none of the 6 .* model.align=refusals, or data.reference=all"):
        found(run, pools)


@pytest.mark.parametrize(
    ("held_on", "kinds"), [("harmful", ["harmful"]), ("both", ["harmful", "benign"]), ("harmless", ["benign"])]
)
def test_a_subspace_is_built_from_the_kinds_that_are_held(held_on, kinds):
    """In every form: what all prompts of a kind and form begin with is the opening of these."""
    ids = {
        "harmful": [[1, 5, 6, 9], [1, 7, 6, 9], [2, 5, 6, 8], [2, 7, 6, 8]],  # two prompts, then in another form
        "benign": [[1, 11, 9], [1, 12, 9], [1, 13, 9], [2, 11, 8], [2, 12, 8], [2, 13, 8]],
    }
    rows = {kind: [PromptRow(str(at), "") for at in range(n)] for kind, n in (("harmful", 2), ("benign", 3))}
    held = References(rows["harmful"], rows["benign"], [], 2, ids["harmful"], ids["benign"], {"other": 2})
    spec = SubspaceSpec("ffn_out", 0.9, None, "all", True, held_on)
    found, parts = protected.texts(held, spec)
    assert found == [each for kind in kinds for each in ids[kind]]
    expected = {"harmful": [Parts(1, 2, 4)] * 4, "benign": [Parts(1, 2, 3)] * 6}
    assert parts == [part for kind in kinds for part in expected[kind]]
