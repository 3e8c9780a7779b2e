"""The table of the shipped start's rates, from ``rates.json`` beside it."""

from __future__ import annotations

from typing import Any

from cwac_lab.core.cache import read_json
from cwac_lab.evaluation.metrics import METRICS
from cwac_lab.models import shipped

# Sets on which recipes were compared; the others were looked at once.
CHOSEN_ON = ("HarmBench validation", "XSTest unsafe, half A", "XSTest safe, half A")


def page() -> str:
    """Return the page: a row a set, a column a model."""
    told = read_json(shipped.FOLDER / shipped.RATES)
    models: dict[str, dict[str, Any]] = told["models"]
    lines = [
        "# The start\n",
        "Made by `make docs` of `src/cwac_lab/models/start/rates.json`, which\n",
        "    python -m cwac_lab.benchmarks.start data.root=FOLDER\n",
        f"measures: {told['answer_tokens']} new tokens a prompt, judged by `{told['judge'][:16]}`. Percent [95 % "
        "interval], lower is better; n: coherent answers, on which the rate is. HS: harmful prompts that are "
        "answered; over-refusal: harmless prompts that are refused. Recipes were compared on sets with a star.\n",
        "| set | rate | " + " | ".join(f"{name} | n | incoherent" for name in models) + " |",
        "| --- | --- " + "| --- | --- | --- " * len(models) + "|",
    ]
    for name in dict.fromkeys(name for model in models.values() for name in model["sets"]):
        held = [model["sets"].get(name) for model in models.values()]
        heading = METRICS[next(rate for rate in held if rate)["rate"]].heading
        star = "*" if name in CHOSEN_ON else ""
        lines.append(f"| {name}{star} | {heading} | " + " | ".join(_cells(rate) for rate in held) + " |")
    ratios = " | ".join(f"{model.get('perplexity_ratio', float('nan')):.3f} | | " for model in models.values())
    lines.append(f"| {told['perplexity_on']} | perplexity, times the original's | {ratios} |")
    return "\n".join(lines) + "\n"


def _cells(rate: dict[str, Any] | None) -> str:
    if rate is None or rate["value"] is None:
        return " | | "
    return f"{rate['value']:.1f} [{rate['low']:.1f}, {rate['high']:.1f}] | {rate['n']} | {rate['incoherent']:.1f}"
