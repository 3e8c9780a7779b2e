"""What a run prints: a banner that names the weights, one line a stage, and the result at the end."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table

_ROWS = (
    ("harmful_score", "harmful score (HS, lower is better)"),
    ("finetune_accuracy", "fine-tuning accuracy (FA, higher is better)"),
    ("over_refusal", "over-refusal, harmless instructions"),
    ("over_refusal_lookalike", "over-refusal, harmless look-alikes"),
    ("incoherent", "incoherent answers"),
)


def _cell(rate: dict[str, Any]) -> tuple[str, str, str]:
    if rate["value"] is None:
        return "n/a", "", str(rate["n"])
    return f"{rate['value']:.1f} %", f"[{rate['low']:.1f}, {rate['high']:.1f}]", str(rate["n"])


class Screen:
    """Prints to the terminal through rich."""

    def __init__(self, *, quiet: bool = False) -> None:
        """Open the console; a quiet one prints nothing."""
        self.console = Console(highlight=False, quiet=quiet)

    def banner(self, weights: str, facts: dict[str, Any]) -> None:
        """Print which weights really run and what with."""
        lines = "\n".join(f"{name}: {value}" for name, value in facts.items())
        self.console.print(Panel(f"[bold]{weights}[/bold]\n{lines}", title="cwac-lab", expand=False))

    def say(self, text: str) -> None:
        """Print one line about a stage."""
        self.console.print(f"[dim]-[/dim] {text}", soft_wrap=True)

    def result(self, title: str, metrics: dict[str, Any]) -> None:
        """Print the rates of a run with intervals and n."""
        table = Table("", "rate", "95 % interval", "n", title=title, title_justify="left")
        for key, words in _ROWS:
            if key in metrics:
                table.add_row(words, *_cell(metrics[key]))
        if "leak" in metrics:
            table.add_row("leak of the weight constraint", f"{metrics['leak']:.1e}", "", "")
        self.console.print(table)
        if metrics.get("broken"):
            self.console.print(
                "[bold red]broken model:[/bold red] too many incoherent answers; its rates say nothing of safety"
            )
