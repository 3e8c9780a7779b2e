"""The model card of an exported model, with its safety card: what was measured, what was not, how to repeat it."""

from __future__ import annotations

from typing import Any

import yaml
from huggingface_hub import ModelCardData

from cwac_lab.core.cache import shortened
from cwac_lab.core.paths import last_part
from cwac_lab.evaluation.combined import described
from cwac_lab.evaluation.metrics import SHOWN
from cwac_lab.evaluation.verdicts import HARMFULNESS
from cwac_lab.models.origin import CARD
from cwac_lab.report import costs
from cwac_lab.results.record import judged_by

FILE = CARD
# What no rate of a run says anything about.
NOT_MEASURED = "languages other than that of the test prompts; conversations of several turns; attacks on the prompt"
# The same, unless a record has it: by its name there.
UNLESS = {HARMFULNESS: "how harmful an answer is", "lm_eval": "abilities other than the task"}


def card(
    config: dict[str, Any], metrics: dict[str, Any], provenance: dict[str, Any], run: str, *, adapter: bool = False
) -> str:
    """Return the text of a card, as the hub takes it.

    Args:
        config: The resolved configuration of the run.
        metrics: Its ``Metrics``.
        provenance: Its ``Provenance``.
        run: Name of the run.
        adapter: Whether it is the card of an adapter, not of a whole model.
    """
    base = provenance.get("base", {})  # records of before have none
    terms = base | {"license": base.get("license") or "unknown"}
    data = ModelCardData(
        library_name="peft" if adapter else "transformers", pipeline_tag="text-generation", tags=["cwac-lab"], **terms
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {run}",
        f"{metrics['weights']}, fine-tuned on {metrics['task']} with cwac-lab {provenance.get('cwac_lab', '')}, "
        f"`constraint={metrics['constraint']}`.",
        "## Safety card",
        _rates(metrics),
        f"Percent with 95 % interval. n: prompts or rows that count. Judged by {judged_by(metrics)}, on the "
        f"{metrics['split']} prompts. HS says whether a harmful prompt is answered, whatever the answer is worth."
        + _broken(metrics)
        + _rounded(config),
        f"Not measured: {'; '.join(_not_measured(metrics))}.",
        "## What it was made of",
        _made_of(metrics, provenance),
        "## Settings",
        f"```yaml\n{yaml.safe_dump(_settings(config), sort_keys=False).strip()}\n```",
        "## Repeat it",
        f"    python -m cwac_lab.replay run={last_part(config.get('output_root', 'outputs'))}/runs/{run}",
        "The licences of the base model and of the data hold for this model too.",
    ]
    return "\n\n".join(parts) + "\n"


def _not_measured(metrics: dict[str, Any]) -> list[str]:
    return [NOT_MEASURED, *(words for name, words in UNLESS.items() if name not in metrics)]


def _rates(metrics: dict[str, Any]) -> str:
    lines = ["| rate | | n |", "| --- | --- | --- |"]
    for name, metric in SHOWN.items():
        rate = metrics.get(name)
        if rate is not None and rate["value"] is not None:
            lines.append(f"| {metric.words} | {_interval(rate, 1)} | {rate['n']} |")
    for name in (name for name in metrics if "/" in name):
        found, rate = described(name), metrics[name]
        if found.shown and rate["value"] is not None:
            lines.append(f"| {found.words} | {_interval(rate, 1)} | {rate['n']} |")
    if HARMFULNESS in metrics:
        mean = metrics[HARMFULNESS]
        words = "harmfulness of answers to harmful prompts, a mean (lower is better)"
        lines.append(f"| {words} | {_interval(mean, 1)} | {mean['n']} |")
    if "held_out_loss" in metrics:
        loss = metrics["held_out_loss"]
        lines.append(
            f"| loss on held-out answers, nats a token (lower is better) | {_interval(loss, 3)} | {loss['n']} |"
        )
    lines += [f"| {words} | {told} | {n} |" for words, told, n in costs.lines(metrics)]
    return "\n".join(lines)


def _interval(rate: dict[str, Any], digits: int) -> str:
    value = f"{rate['value']:.{digits}f}"
    return value if rate["low"] is None else f"{value} [{rate['low']:.{digits}f}, {rate['high']:.{digits}f}]"


def _broken(metrics: dict[str, Any]) -> str:
    return " **The model is broken**: too many answers are incoherent for rates to say anything of safety." * bool(
        metrics["broken"]
    )


def _made_of(metrics: dict[str, Any], provenance: dict[str, Any]) -> str:
    rows, base = metrics.get("training", {}).get("rows"), provenance.get("base", {})
    system, guarded = provenance.get("system_sha256"), _guarded(metrics.get("guard"))
    told = [
        *([f"- base model: {base['base_model']}"] if base.get("base_model") else []),
        f"- licence of the base: {_licence(base)}",
        f"- start weights: {metrics['weights']} (`{shortened(metrics['weights_content'], 16)}`)",
        f"- rows: SHA-256 `{provenance['task_data_sha256'][:16]}`"
        + (f", {rows['rows']} conversations, {rows['tokens']['learned']} tokens learned" if rows else ""),
        f"- share of harmful rows: {metrics['harmful_ratio']:g}",
        f"- prompts that refusals were held and measured on: SHA-256 `{provenance['pools_sha256'][:16]}`",
        *([f"- the rows' most frequent system prompt: SHA-256 `{system[:16]}`"] if system else []),
        f"- steps: {metrics['training']['steps']}, seed {metrics['seed']}",
        *([f"- {guarded}"] if guarded else []),
    ]
    return "\n".join(told)


def _guarded(guard: dict[str, Any] | None) -> str:
    """Return what a guard did in words; "" where there was none."""
    if guard is None:
        return ""
    if guard["rolled_back_to"] is not None:
        return f"guard: it ended training and put the weights after {guard['rolled_back_to']} steps back"
    if guard["ended"] is not None:
        return f"guard: it ended training after {guard['ended']} steps"
    return f"guard: it replayed refusals {guard['replays']} times" if guard["replays"] else "guard: it did nothing"


def _licence(base: dict[str, str | None]) -> str:
    """Return the licence of a base in words."""
    name, link = base.get("license_name") or base.get("license"), base.get("license_link")
    return " ".join(filter(None, (name, link))) or "not stated by the base"


def _rounded(config: dict[str, Any]) -> str:
    """Return what is to be known of an adapter that was trained beside rounded weights; "" elsewhere."""
    if config.get("tuning", {}).get("base", "float32") == "float32":
        return ""
    return " The rates are of the merged model. Beside weights that are not rounded, the adapter is another model."


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that make the model: the constraint's, the trainer's, and what is tuned."""
    return {name: config[name] for name in ("constraint", "tuning", "trainer") if name in config}
