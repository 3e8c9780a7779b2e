"""Tables of all recorded runs: ``python -m cwac_lab.tables``."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from cwac_lab import cli


def main(config: DictConfig) -> None:
    """Print the summary as Markdown, and write it with its CSV under ``output_root/tables``."""
    from cwac_lab.cache import write_text
    from cwac_lab.errors import MissingAsset
    from cwac_lab.report.paired import differences
    from cwac_lab.report.tables import markdown, records, summary
    from cwac_lab.results.store import runs

    root = Path(config.output_root)
    rows = records(runs(root))
    if not rows:
        raise MissingAsset(f"output_root={root}: no finished runs there; run `python -m cwac_lab.train` first")
    table = summary(rows)
    text = markdown(table)
    compared = differences(rows)
    if len(compared):
        text += "\n" + markdown(compared, "Paired differences in points: ")
    write_text(root / "tables" / "summary.md", text)
    write_text(root / "tables" / "summary.csv", table.to_csv(index=False))
    print(text)


if __name__ == "__main__":
    cli.launch(main, "tables")
