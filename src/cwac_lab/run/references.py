"""Reference prompts of a constraint: harmful ones that the start model refuses, with its own refusals; benign ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cwac_lab.config.run import Run
from cwac_lab.core import recipes
from cwac_lab.core.cache import cached_folder, digest, read_jsonl, reading, write_jsonl
from cwac_lab.core.errors import QualityError
from cwac_lab.data.declines import declines
from cwac_lab.data.forms import SYSTEM, Form
from cwac_lab.data.pools import Pools
from cwac_lab.data.responses import refusal
from cwac_lab.data.sources import PromptRow
from cwac_lab.evaluation.generate import Answer, answers
from cwac_lab.models.chat import ChatFormat, Prompt

ANSWERS = "answers.jsonl"
_PLAIN = Form()


@dataclass(frozen=True)
class References:
    """What the constraint holds on to.

    Attributes:
        harmful: Reference prompts of the harmful kind.
        benign: Reference prompts of the harmless kind.
        refusals: Harmful prompts with the start model's refusal, as token ids; one that was cut has no end of turn.
            Those of the alignment pool are among them where the constraint needs them.
        asked: Harmful reference prompts that were asked, of which ``harmful`` are kept.
        harmful_ids: The harmful prompts as token ids, up to where the answer starts; first in the model's own form.
        benign_ids: The harmless ones, likewise.
        forms: How many harmful prompts are held in every other form.
    """

    harmful: list[PromptRow]
    benign: list[PromptRow]
    refusals: list[list[int]]
    asked: int
    harmful_ids: list[list[int]]
    benign_ids: list[list[int]]
    forms: dict[str, int]


def _answers(
    run: Run, rows: list[PromptRow], content: str, model: Any, chat: ChatFormat, say: Callable[[str], None],
    form: Form = _PLAIN,
) -> list[Answer]:  # fmt: skip
    """Return the start model's greedy answers, opening only; cached by weights and prompts."""
    longest = run.align.answer_tokens
    prompts = _asked(rows, form)
    key = recipes.ANSWERS.key(
        model=content,
        dtype=str(model.dtype),
        prompts=digest([chat.prompt_ids(prompt) for prompt in prompts]),
        tokens=longest,
        end=chat.end_id,
    )

    def build(folder: Path) -> None:
        say(f"asking the start model {len(prompts)} harmful prompts, to keep those it refuses")
        given = answers(model, chat, prompts, longest, run.evaluation.batch_size)
        write_jsonl(
            folder / ANSWERS, ({"id": row.id, **asdict(answer)} for row, answer in zip(rows, given, strict=True))
        )

    folder = cached_folder(Path(run.cache_root), recipes.ANSWERS.kind, key, build)
    with reading(folder):
        given = [Answer(row["text"], row["ended"], row["first"]) for row in read_jsonl(folder / ANSWERS)]
        if len(given) != len(rows):
            raise ValueError(f"{len(given)} answers to {len(rows)} prompts")
    return given


def _kept(
    run: Run, pools: Pools, content: str, model: Any, chat: ChatFormat, say: Callable[[str], None]
) -> tuple[list[PromptRow], list[list[int]]]:
    """Return the harmful reference prompts that are held, and refusals as token ids."""
    asked = pools.get("harmful", "reference")
    taught = pools.get("harmful", "alignment") if run.constraint.requirements.alignment_refusals else []

    def canned(rows: list[PromptRow]) -> list[list[int]]:
        return [chat.encode(row.prompt, refusal(row)).input_ids for row in rows]

    if run.data.reference == "all":
        return asked, canned(asked + taught)
    given = _answers(run, asked, content, model, chat, say)
    kept = [row for row, answer in zip(asked, given, strict=True) if declines(answer.text)]
    if not kept:
        raise QualityError(
            f"the start model refuses none of the {len(asked)} harmful reference prompts: there is nothing to hold "
            "(accepted: model.align=refusals, or data.reference=all)"
        )

    def own(rows: list[PromptRow], given: list[Answer]) -> list[list[int]]:
        return [
            chat.encode_own(row.prompt, answer.text, ended=answer.ended).input_ids
            for row, answer in zip(rows, given, strict=True)
            if declines(answer.text)
        ]

    if not taught or run.model.align != "none":
        return kept, own(asked, given) + canned(taught)
    return kept, own(asked + taught, given + _answers(run, taught, content, model, chat, say))


def _asked(rows: list[PromptRow], form: Form = _PLAIN) -> list[Prompt]:
    return [form.asked(row.prompt) for row in rows]


def _ids(chat: ChatFormat, rows: list[PromptRow], form: Form = _PLAIN) -> list[list[int]]:
    return [chat.prompt_ids(prompt) for prompt in _asked(rows, form)]


def forms_of(run: Run) -> dict[str, Form]:
    """Return the other forms that a run's constraint holds refusals in: those chosen, and the rows' system prompt.

    A constraint that holds on to no prompt has no such form of its own accord. Beginnings of rows are among them once
    the rows are known (``FormsConfig.after``).
    """
    needs = run.constraint.requirements
    system = run.task.system if needs.subspace is not None or needs.features is not None else None
    return {**run.forms.fixed(), **({SYSTEM: Form(system=system)} if system is not None else {})}


def references(
    run: Run, pools: Pools, content: str, model: Any, chat: ChatFormat, say: Callable[[str], None]
) -> References:
    """Return the reference prompts of a run.

    With ``data.reference=refused`` (the paper's) a harmful prompt that the start model answers is left out: there is
    no refusal to hold. A model aligned here was taught the project's refusals to the alignment pool; one that was not
    is asked for its own, where the constraint needs them (``Requirements.alignment_refusals``). In every form of
    ``forms_of`` (this project's, not the paper's) all prompts are asked again, and those held that are refused in that
    form.

    Args:
        run: The run.
        pools: Its prompt pools.
        content: Identity of the start weights.
        model: The start model, in evaluation mode.
        chat: Its chat format.
        say: Reports a stage.

    Raises:
        QualityError: If the start model refuses none of the reference prompts.
    """
    asked, benign = pools.get("harmful", "reference"), pools.get("harmless", "reference")
    _tell_cut(chat, _PLAIN, asked + benign, "reference prompts", say)
    kept, refusals = _kept(run, pools, content, model, chat, say)
    harmful_ids, benign_ids, forms = _ids(chat, kept), _ids(chat, benign), {}
    for name, form in forms_of(run).items():
        other = chat.with_template(form.template)
        words = f"forms.others.{name}" if name in run.forms.others else "under the system prompt"
        if _ids(other, asked, form) == _ids(chat, asked):
            say(f"{words}: is the model's own form, nothing is held twice")
            forms[name] = 0
            continue
        _tell_cut(other, form, asked + benign, f"reference prompts, form {name},", say)
        held = asked
        if run.data.reference == "refused":
            given = _answers(run, asked, content, model, other, say, form)
            held = [row for row, answer in zip(asked, given, strict=True) if declines(answer.text)]
        if not held:
            say(f"{words}: the start model refuses none of the {len(asked)} prompts, none is held")
        forms[name] = len(held)
        harmful_ids += _ids(other, held, form)
        benign_ids += _ids(other, benign, form) if held else []
    return References(kept, benign, refusals, len(asked), harmful_ids, benign_ids, forms)


def _tell_cut(chat: ChatFormat, form: Form, rows: list[PromptRow], what: str, say: Callable[[str], None]) -> None:
    for line in chat.told_cut(chat.n_cut(_asked(rows, form)), len(rows), what):
        say(line)
