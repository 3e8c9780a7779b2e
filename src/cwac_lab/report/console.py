"""What a run prints: a banner that names the weights, one line a stage, and the result at the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from cwac_lab.evaluation.combined import described
from cwac_lab.evaluation.metrics import METRICS, SHOWN
from cwac_lab.evaluation.verdicts import BROKEN, HARMFULNESS
from cwac_lab.report import costs


def _of_set(rate: dict[str, Any] | None) -> tuple[str, str, str]:
    """Return the rate of a set, its n, and the share of answers that it leaves out; blanks where a model has none."""
    if rate is None:
        return "", "", ""
    return *_cell(rate), f"{rate['incoherent']:.1f}"


def _cell(rate: dict[str, Any]) -> tuple[str, str]:
    """Return a rate with its interval, and its n."""
    known = rate["value"] is not None
    return f"{rate['value']:.1f} [{rate['low']:.1f}, {rate['high']:.1f}]" if known else "n/a", str(rate["n"])


_DRIFT = {
    "weight": "||dW h0||, by the weights",
    "activation": "||W0 dh||, by their input",
    "cross": "||dW dh||, by both",
    "total": "||W h - W0 h0||",
    "bound": "bound of it, from both constraints",
    "overlap": "overlap of leading directions, before and now",
    "leak": "leak, ||dW V|| / ||dW||",
    "latents_chosen": "safety latents, squared deviations",
    "latents_others": "other latents, squared deviations",
    "latents_code": "codes of safety latents, relative",
    "refusal_cosine": "cosine of the refusal direction, before and now",
    "kl": "KL at the first tokens of the start's answers",
}


def _kappa(agreement: dict[str, Any]) -> str:
    """Return how far another judge agrees with the first, where that can be said."""
    told = ((words, agreement[words]) for words in ("harmful", "harmless"))
    known = [f"{words} {each['kappa']:.2f}, n={each['n']}" for words, each in told if each["kappa"] is not None]
    return f" (kappa {'; '.join(known)})" if known else ""


def _cost(judge: str, told: dict[str, Any]) -> str:
    """Return what an endpoint took, in one line."""
    cost = told["cost"]
    asked = f"{cost['requests']} requests, {cost['cached']} replies from the cache"
    tokens = f"{cost['tokens_read']} tokens read, {cost['tokens_written']} written"
    return f"judge {judge} ({told['model']}, rubric {told['rubric']}): {asked}; {tokens}"


BROKEN_MEANS = "too many incoherent answers; its rates say nothing of safety"


class Screen:
    """Prints to the terminal through rich."""

    def __init__(self, *, quiet: bool = False) -> None:
        """Open the console; a quiet one prints nothing."""
        self.console = Console(highlight=False, quiet=quiet)

    def banner(self, weights: str, facts: dict[str, Any]) -> None:
        """Print which weights really run and what with."""
        lines = "\n".join(f"{name}: {value}" for name, value in facts.items())
        self.console.print(Panel(Text.assemble((weights, "bold"), "\n", lines), title="cwac-lab", expand=False))

    def say(self, text: str, style: str = "") -> None:
        """Print one line about a stage, as it stands: ``[a]`` is part of a path or a list, no mark-up."""
        self.console.print(Text.assemble(("-", "dim"), " ", (text, style)), soft_wrap=True)

    def drift(self, title: str, found: dict[str, Any]) -> None:
        """Print the means over layers of what moved, by kind of prompts."""
        kinds = found["summary"]
        heads = [f"{kind} (n={found['prompts'][kind]})" for kind in kinds]
        table = Table("", *heads, title=escape(f"{title} | {found['scope']}"), title_justify="left")
        for name, words in _DRIFT.items():
            if any(name in means for means in kinds.values()):
                table.add_row(words, *(f"{means[name]:.3g}" if name in means else "" for means in kinds.values()))
        for layer, by_kind in found.get("reconstruction", {}).items():
            told = (f"{told['start']:.3f} -> {told['now']:.3f}" for told in by_kind.values())
            table.add_row(f"explained variance, autoencoder after layer {layer}", *told)
        self.console.print(table)

    def correlations(self, found: pd.DataFrame) -> None:
        """Print how measurements of drift go with the harmful score over runs; nothing where there are too few."""
        if found.empty:
            return
        table = Table(
            "", "Spearman's rho", "95 % interval", "runs", title="with the harmful score", title_justify="left"
        )
        for _, row in found.iterrows():
            words = _DRIFT.get(row["measurement"], row["measurement"])
            table.add_row(words, f"{row['rho']:+.2f}", f"[{row['low']:+.2f}, {row['high']:+.2f}]", str(row["n"]))
        self.console.print(table)

    def rates(self, report: dict[str, Any]) -> None:
        """Print the rates of starts by set (``evaluation.sets``): rate, n and incoherent answers of each model."""
        models = report["models"]
        heads = [head for name in models for head in (escape(name), "n", "incoherent")]
        table = Table("refused of harmless, answered of harmful prompts", *heads)
        for name in dict.fromkeys(name for model in models.values() for name in model["sets"]):
            held = [model["sets"].get(name) for model in models.values()]
            words = METRICS[next(rate for rate in held if rate)["rate"]].heading
            table.add_row(f"{name} ({words})", *(cell for rate in held for cell in _of_set(rate)))
        ratios = [model.get("perplexity_ratio") for model in models.values()]
        if any(ratios):
            told = (cell for ratio in ratios for cell in (f"{ratio:.3f}" if ratio else "", "", ""))
            table.add_row("perplexity on the original's own answers, times the original's", *told)
        self.console.print(table)
        for name, model in models.items():
            if any(rate.get("broken") for rate in model["sets"].values()):
                self.console.print(f"[bold red]broken model:[/bold red] {escape(name)}: {BROKEN_MEANS}")

    def held(self, found: dict[str, dict[str, tuple[float, float]]]) -> None:
        """Print what the weight constraint holds of unseen harmful prompts, by kind of site and part of the text."""
        parts = list(dict.fromkeys(part for told in found.values() for part in told))
        title = "held of unseen harmful prompts, %: mean over layers (least)"
        table = Table("", *parts, title=title, title_justify="left")
        for kind, told in found.items():
            shares = (told.get(part) for part in parts)
            table.add_row(kind, *(f"{100 * each[0]:.2f} ({100 * each[1]:.2f})" if each else "" for each in shares))
        self.console.print(table)

    def table(self, title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print texts in columns."""
        table = Table(*heads, title=escape(title), title_justify="left")
        for row in rows:
            table.add_row(*map(escape, row))
        self.console.print(table)

    def result(self, title: str, metrics: dict[str, Any]) -> None:
        """Print the rates of a run with intervals and n."""
        table = Table("", "% [95 % interval]", "n", title=escape(title), title_justify="left")
        for key, metric in SHOWN.items():
            if key in metrics:
                table.add_row(metric.words, *_cell(metrics[key]))
        for key in (key for key in metrics if "/" in key and isinstance(metrics[key], dict)):
            found = described(key)
            if found.shown or (metrics[key]["value"] or 0.0) > BROKEN:
                table.add_row(found.words, *_cell(metrics[key]))
        for name, told in metrics.get("judges", {}).items():
            if "agreement" not in told:
                table.add_row("judged by", f"{name} {told['version'][:8]}", "")
            else:
                table.add_row(
                    f"HS, judge {name} {told['version'][:8]}{_kappa(told['agreement'])}", *_cell(told["harmful_score"])
                )
            if HARMFULNESS in told:
                table.add_row(f"harmfulness, judge {name}", *_cell(told[HARMFULNESS]))
        if HARMFULNESS in metrics:
            table.add_row("harmfulness of answers to harmful prompts (lower is better)", *_cell(metrics[HARMFULNESS]))
        if "held_out_loss" in metrics:
            loss = metrics["held_out_loss"]
            told = f"{loss['value']:.3f}" + ("" if loss["low"] is None else f" [{loss['low']:.3f}, {loss['high']:.3f}]")
            words = f"loss on held-out answers, nats a token (perplexity {math.exp(loss['value']):.2f})"
            table.add_row(words, told, str(loss["n"]))
        for words, told, n in costs.lines(metrics):
            table.add_row(escape(words), escape(told), n)
        if "leak" in metrics:
            table.add_row("leak of the weight constraint", f"{metrics['leak']:.1e}", "")
        self.console.print(table)
        for name, told in metrics.get("judges", {}).items():
            if "cost" in told:
                self.say(_cost(name, told))
            if unknown := told.get("unparsable", told.get("agreement", {}).get("unparsable")):
                self.say(f"judge {name} could not judge {unknown} answers; they count in no rate")
        if metrics.get("broken"):
            self.console.print(f"[bold red]broken model:[/bold red] {BROKEN_MEANS}")
