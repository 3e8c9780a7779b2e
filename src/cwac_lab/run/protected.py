"""What the weight constraint holds: the texts that its subspace is built from, and how much of unseen ones is in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cwac_lab.config.run import Run
from cwac_lab.core import recipes
from cwac_lab.core.cache import digest, read_json, reading, write_json
from cwac_lab.defenses.cwac.subspace.coverage import covered, covered_by_part
from cwac_lab.defenses.cwac.subspace.parts import Parts, parts_of
from cwac_lab.defenses.cwac.subspace.spec import Subspace, SubspaceSpec
from cwac_lab.defenses.interface import Context
from cwac_lab.evaluation.generate import answers
from cwac_lab.models.chat import ChatFormat
from cwac_lab.run.cached import together
from cwac_lab.run.references import References
from cwac_lab.run.start import Start

SHARE = "share.json"
# Harmful prompts of the evaluation on which it is measured how much is held: seconds for the packaged weights. Of their
# answers it is the first tokens.
_UNSEEN, _FIRST = 32, 8


def texts(held: References, spec: SubspaceSpec) -> tuple[list[list[int]], list[Parts]]:
    """Return the reference prompts that a subspace is built from, with answers where they count, and their parts."""
    forms = [size for size in held.forms.values() if size]
    found: list[list[int]] = []
    groups: list[int] = []
    if spec.held_on != "harmless":
        found, groups = list(held.harmful_ids), [len(held.harmful), *forms]
    if spec.held_on != "harmful":
        found += held.benign_ids
        groups += [len(held.benign)] * (1 + len(forms))
    parts = parts_of(found, groups)
    for at, answered in enumerate(held.refusals[: len(held.harmful)] if spec.answers == "own" else ()):
        if answered[: len(found[at])] == found[at]:  # not where the prompt had to be cut for the answer
            found[at] = answered
    return found, parts


def surely_free(texts: list[list[int]], parts: list[Parts], spec: SubspaceSpec, subspace: Subspace) -> str:
    """Return a line where texts have fewer tokens than a layer has inputs; empty where not, or with a fixed rank.

    Args:
        texts: What the subspace is built from, as token ids.
        parts: Their parts.
        spec: How it is built.
        subspace: The subspace.
    """
    openings = {tuple(ids[: each.opening]) for ids, each in zip(texts, parts, strict=True)}
    tokens = sum(len(ids) - each.opening for ids, each in zip(texts, parts, strict=True)) + sum(map(len, openings))
    return few_tokens(tokens, {name: span.width for name, span in subspace.spans.items()}) if spec.rank is None else ""


def few_tokens(tokens: int, widths: Mapping[str, int]) -> str:
    """Return a line where reference prompts have fewer tokens than a layer has inputs; empty where not.

    A token protects one direction at most. So what is free there is free at any energy.

    Args:
        tokens: How many, those of an opening once.
        widths: How many inputs the layers have, by site; experts read a part of the tokens, and are told apart.
    """
    width = max((width for name, width in widths.items() if ".experts." not in name), default=0)
    if tokens >= width:
        return ""
    return (
        f"the reference prompts have {tokens} tokens, the widest layer {width} inputs: {width - tokens} directions of "
        "it are free at any energy; more prompts protect more (data.harmful.reference, data.reference=all, "
        "constraint.weight.held_on=both)"
    )


def shares(
    run: Run, begin: Start, context: Context, facts: dict[str, Any], chat: ChatFormat
) -> Iterator[tuple[str, float]]:
    """Yield how much of the inputs is held: of the reference prompts, form by form, and of the prompts to come."""
    spec, subspace = run.constraint.requirements.subspace, context.subspace
    assert spec is not None
    assert subspace is not None
    at = 0
    for name, n in {"as they stand": facts["reference"]["kept"], **facts["reference"].get("forms", {})}.items():
        if n:
            ids = context.reference[at : at + n]
            yield f"harmful reference prompts, {name}", covered(context.model, ids, subspace, spec, chat.pad_id)
        at += n
    if spec.held_on != "harmful":
        yield "harmless reference prompts", covered(context.model, context.benign, subspace, spec, chat.pad_id)
    for kind in ("harmful", "harmless"):
        ids = _to_come(run, begin, chat, kind)
        name = f"{kind} prompts of {run.evaluation.split} as attack={run.attack.name} asks"
        if ids:
            yield name, covered(context.model, ids, subspace, spec, chat.pad_id)


def _to_come(run: Run, begin: Start, chat: ChatFormat, kind: str) -> list[list[int]]:
    """Return the token ids of the prompts of a kind that the run is evaluated on, as its attack asks them."""
    asking = chat.with_template(run.attack.template)
    rows = begin.pools.get(kind, run.evaluation.split)
    return [asking.prompt_ids(run.attack.asked(row.prompt)) for row in rows]


def held_share(run: Run, begin: Start, context: Context, facts: dict[str, Any], chat: ChatFormat) -> float | None:
    """Return how much of the start's inputs the weight constraint holds on the harmful prompts of the evaluation.

    Nothing was built from these; the first ``_UNSEEN`` are read. It is ``coverage.covered``, of 1; cached, so that the
    runs of a sweep read them once. None where nothing is held, or no prompt is asked.

    Args:
        run: The run.
        begin: Its start.
        context: What ``artefacts`` returned, with the start model.
        facts: The same.
        chat: The chat format.
    """
    spec, subspace = run.constraint.requirements.subspace, context.subspace
    ids = _to_come(run, begin, chat, "harmful")[: run.evaluation.n_prompts][:_UNSEEN]
    if spec is None or subspace is None or not ids:
        return None

    def build(folder: Path) -> None:
        write_json(folder / SHARE, covered(context.model, ids, subspace, spec, chat.pad_id))

    key = recipes.HELD_SHARE.key(subspace=facts["subspace"]["folder"], prompts=digest(ids))
    folder = together(Path(run.cache_root), recipes.HELD_SHARE.kind, key, build)
    with reading(folder):
        return float(read_json(folder / SHARE))


def by_part(
    run: Run, begin: Start, context: Context, chat: ChatFormat
) -> dict[str, dict[str, tuple[float, float]]] | None:
    """Return what is held of unseen harmful prompts, by kind of site and part of the text (``covered_by_part``).

    The prompts are those that the run is evaluated on, as they stand; the first tokens of the answer are the start's
    own. None where nothing is held, or there are fewer than two prompts.

    Args:
        run: The run.
        begin: Its start.
        context: What ``artefacts`` returned, with the start model.
        chat: The chat format.
    """
    spec, subspace = run.constraint.requirements.subspace, context.subspace
    rows = begin.pools.get("harmful", run.evaluation.split)[:_UNSEEN]
    if spec is None or subspace is None or len(rows) < 2:
        return None
    prompts = [row.prompt for row in rows]
    given = answers(context.model, chat, prompts, _FIRST, run.evaluation.batch_size)
    parts = parts_of([chat.prompt_ids(prompt) for prompt in prompts])
    asked = [
        chat.encode_own(prompt, answer.text, ended=False).input_ids
        for prompt, answer in zip(prompts, given, strict=True)
    ]
    return covered_by_part(context.model, asked, parts, subspace, spec, chat.pad_id)
