"""Alignment stage: teach a packaged chat model to refuse, so that there is something to lose.

Refusals to harmful prompts, and the own greedy answers to harmless ones, which keep everything else as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cwac_lab.config.run import Run
from cwac_lab.core import recipes
from cwac_lab.core.cache import cached_folder, digest, read_json, reading, write_json
from cwac_lab.data.declines import RULE, declines
from cwac_lab.data.pools import Pools
from cwac_lab.data.responses import refusal
from cwac_lab.data.sources import PromptRow
from cwac_lab.defenses.interface import Defense
from cwac_lab.evaluation.generate import answers, generate
from cwac_lab.evaluation.verdicts import aggregate, judge_rows
from cwac_lab.judges.refusal import RefusalJudge
from cwac_lab.models.chat import ChatFormat, Encoded
from cwac_lab.models.loading import ModelFolder, content_digest, load_chat, load_model
from cwac_lab.training.loop import fit
from cwac_lab.training.settings import INCIDENTAL_TRAINER, TrainerConfig

REPORT = "alignment.json"
# The alignment seed is fixed: an aligned start is shared by all runs, whatever their seed.
ALIGNMENT_SEED = 0
# Length of the answers that an aligned start is measured by: one for all, as runs with other lengths share the start.
MEASURED_TOKENS = 48


def _measure(model: Any, chat: ChatFormat, pools: Pools, run: Run) -> dict[str, Any]:
    """Return the validation rates of a model."""
    rows = []
    lengths = (MEASURED_TOKENS, run.evaluation.batch_size)
    for kind in ("harmful", "harmless"):
        held = pools.get(kind, "validation")
        outputs = generate(model, chat, [row.prompt for row in held], *lengths) if held else []
        rows += [
            {"kind": kind, "id": row.id, "prompt": row.prompt, "output": output}
            for row, output in zip(held, outputs, strict=True)
        ]
    metrics = aggregate(judge_rows(rows, run.task, RefusalJudge()))
    return {name: metrics[name] for name in ("harmful_score", "over_refusal", "incoherent", "broken")}


def _trainer(run: Run) -> TrainerConfig:
    return TrainerConfig(
        epochs=run.align.epochs,
        batch_size=run.align.batch_size,
        learning_rate=run.align.learning_rate,
        schedule="linear",
        warmup_share=0.05,
        gradient_clip=0.0,
        max_length=run.trainer.max_length,
        accelerator=run.trainer.accelerator,
        progress_bar=run.trainer.progress_bar,
    )


def own_answers(model: Any, chat: ChatFormat, rows: list[PromptRow], run: Run) -> list[Encoded]:
    """Return a model's greedy answers to harmless prompts as training rows.

    Where it declines ("I'm sorry for any confusion, but as a chatbot ..."), it answers again without the openings of
    its declines; a prompt that is declined then as well is left out.
    """
    limits = (run.align.answer_tokens, run.evaluation.batch_size)
    given = answers(model, chat, [row.prompt for row in rows], *limits)
    declined = [place for place, answer in enumerate(given) if declines(answer.text)]
    openings = {given[place].first for place in declined}
    again = answers(model, chat, [rows[place].prompt for place in declined], *limits, not_first=openings)
    for place, answer in zip(declined, again, strict=True):
        given[place] = answer
    return [
        chat.encode_own(row.prompt, answer.text, ended=answer.ended)
        for row, answer in zip(rows, given, strict=True)
        if answer.text and not declines(answer.text)
    ]


def _build(
    folder: Path, start: ModelFolder, chat: ChatFormat, pools: Pools, run: Run, say: Callable[[str], None]
) -> None:
    model = load_model(start.path, device=run.trainer.device)
    harmful = pools.get("harmful", "alignment")
    harmless = pools.get("harmless", "alignment") + pools.get("lookalike", "alignment")
    before = _measure(model, chat, pools, run)
    say(f"aligning: {len(harmful)} refusals, {len(harmless)} harmless prompts (own answers, generated now)")
    examples = [chat.encode(row.prompt, refusal(row)) for row in harmful]
    examples += own_answers(model, chat, harmless, run)
    for line in chat.told_cut(sum(example.cut for example in examples), len(examples), "rows of alignment"):
        say(line)
    # Which words mean what need not change; a tenth of a step saved (the table is also the head in small models).
    model.get_input_embeddings().requires_grad_(False)
    fit(model, examples, chat.pad_id, Defense(), _trainer(run), ALIGNMENT_SEED, alone=True, group="align")
    after = _measure(model, chat, pools, run)
    model.save_pretrained(folder)
    chat.tokenizer.save_pretrained(folder)
    told = {"judge": f"{RefusalJudge.name} {RefusalJudge().version}", "before": before, "after": after}
    write_json(folder / REPORT, {"split": "validation", **told})


def aligned(start: ModelFolder, pools: Pools, run: Run, say: Callable[[str], None]) -> ModelFolder:
    """Return the aligned model of a start model: cached by weights, prompts and settings, built on demand."""
    prompts = {
        kind: {pool: [[row.id, row.prompt] for row in pools.get(kind, pool)] for pool in ("alignment", "validation")}
        for kind in ("harmful", "harmless", "lookalike")
    }
    chat = load_chat(start.path, run.trainer.max_length, run.model.chat_template)
    key = recipes.ALIGNED.key(
        judge=RULE,
        start=start.content,
        end=chat.end_id,
        prompts=digest(prompts),
        refusals=digest([refusal(row) for row in pools.get("harmful", "alignment")]),
        answer_tokens=run.align.answer_tokens,
        trainer={name: value for name, value in asdict(_trainer(run)).items() if name not in INCIDENTAL_TRAINER},
        chat_template=run.model.chat_template,
        measured_on=MEASURED_TOKENS,
    )
    folder = cached_folder(
        Path(run.cache_root), recipes.ALIGNED.kind, key, lambda path: _build(path, start, chat, pools, run, say)
    )
    return ModelFolder(folder, f"{start.description}, aligned here", content_digest(folder))


def alignment_report(folder: Path) -> dict[str, Any] | None:
    """Return the rates before and after alignment, or None for a model that was not aligned here."""
    file = folder / REPORT
    if not file.is_file():
        return None
    with reading(folder):
        report: dict[str, Any] = read_json(file)
    return report
