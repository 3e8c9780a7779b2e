"""The long tables of ``docs/tables`` and the figures of ``docs/figures``, from the records of the experiments.

The tables of an experiment are the queries of its ``tables.yaml``, each with its title in the comment above it.
``pairs.yaml``, where there is one, names two methods each that are compared on the same items and seeds.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml

from cwac_lab.core.errors import MissingAsset
from cwac_lab.report.files import NOTE, page
from cwac_lab.report.paired import compare
from cwac_lab.report.records import Row, records
from cwac_lab.report.tables import TITLES
from cwac_lab.results import select
from cwac_lab.tables import views

VIEWS, PAIRS = "tables.yaml", "pairs.yaml"
_COMPARED = ("harmful_score", "finetune_accuracy", "over_refusal", "over_refusal_lookalike")
_TITLE = re.compile(r"((?:^# .*\n)+)^(\w+):", re.MULTILINE)
_SHOWN = re.compile(r"figures/([\w.-]+\.svg)")


def _titles(file: Path) -> dict[str, str]:
    """Return the comment above every key of a YAML file."""
    found = _TITLE.findall(file.read_text(encoding="utf-8"))
    return {key: " ".join(line.removeprefix("# ") for line in words.splitlines()) for words, key in found}


def _no_complaint(told: str) -> None:
    raise MissingAsset(told)


def _tables(experiments: Path) -> Iterator[tuple[Path, str, str]]:
    """Yield folder, name and query of every table."""
    for file in sorted(experiments.glob(f"*/{VIEWS}")):
        for name, query in views(str(file)).items():
            yield file.parent, name, str(query)


def rows_of(folder: Path, name: str, query: str) -> list[Row]:
    """Return the records of a table; one that cannot be read is an error."""
    return records(select(folder, f"{folder.name}/{VIEWS}: {name}", query), _no_complaint)


def table(folder: Path, name: str, query: str) -> str:
    """Return the page of one table."""
    title = _titles(folder / VIEWS)[name]
    where = f"experiments/{folder.name}"
    command = f"    python -m cwac_lab.tables output_root={where} views={where}/{VIEWS}"
    head = f"# {title[0].upper()}{title[1:]}\n\nMade by `make docs` of the records in `{where}`, as by\n\n{command}\n\n"
    return head + page(rows_of(folder, name, query), name)


def pairs(folder: Path) -> str:
    """Return the page of the methods of an experiment that are compared with one another."""
    told = yaml.safe_load((folder / PAIRS).read_text(encoding="utf-8"))
    lines = [
        f"# Methods beside one another: {folder.name}\n",
        f"Made by `make docs` of the records in `experiments/{folder.name}` and the queries of its `{PAIRS}`, by "
        "`cwac_lab.report.paired.compare`.\n",
        "Points [95 % interval], the first method less the second, on the same items and seeds; ↓ below zero is "
        "better, ↑ above zero is better. The interval is over seeds and items. p is the exact sign-flip test's over "
        "items: it takes the seeds as given and is not adjusted. n: items in each seed.\n",
        "| pair | rate | difference | p | n | seeds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, (ours, other) in told.items():
        mine, theirs = rows_of(folder, name, ours), rows_of(folder, name, other)
        for rate in _COMPARED:
            found, p = compare(mine, theirs, rate)
            shown = "<0.0001" if p < 1e-4 else f"{p:.2g}"
            lines.append(f"| {name} | {TITLES[rate]} | {found} | {shown} | {found.n} | {found.seeds} |")
    return "\n".join(lines) + f"\n\n{NOTE}\n"


def pages(experiments: Path) -> dict[str, str]:
    """Return the text of every file of ``docs/tables``, by name; the index is ``README.md``."""
    found = {f"{folder.name}-{name}.md": table(folder, name, query) for folder, name, query in _tables(experiments)}
    found |= {f"{file.parent.name}-pairs.md": pairs(file.parent) for file in sorted(experiments.glob(f"*/{PAIRS}"))}
    lines = ["# Long tables\n", "Made by `make docs` of the records that travel with the project.\n"]
    lines += [f"- [{text.splitlines()[0].removeprefix('# ')}]({name})" for name, text in sorted(found.items())]
    return {**found, "README.md": "\n".join(lines) + "\n"}


def shown(root: Path) -> set[str]:
    """Return the names of the figures that README and the pages show."""
    texts = [root / "README.md", *(root / "docs").glob("*.md")]
    return {name for file in texts for name in _SHOWN.findall(file.read_text(encoding="utf-8"))}


def draw_shown(experiments: Path, root: Path) -> int:
    """Draw the figures that pages show into ``docs/figures``, remove others, and return how many there are.

    They are called ``EXPERIMENT-TABLE-WHAT.svg``, without the hash of what ran that ``report.figures`` adds.

    Raises:
        MissingAsset: If a page shows one that no table has.
    """
    from cwac_lab.report.figures import draw

    wanted, folder = shown(root), root / "docs" / "figures"
    folder.mkdir(exist_ok=True)
    missing = set(wanted)
    for experiment, name, query in _tables(experiments):
        stem = f"{experiment.name}-{name}-"
        if not any(each.startswith(stem) for each in wanted):
            continue
        with tempfile.TemporaryDirectory() as drawn:
            for file in draw(rows_of(experiment, name, query), Path(drawn), name):
                called = stem + file.name.removeprefix(f"{name}-").split("-", 2)[2]
                if called in missing:
                    shutil.copyfile(file, folder / called)
                    missing.remove(called)
    if missing:
        raise MissingAsset(f"docs/figures/{min(missing)}: shown by a page, drawn for no table of experiments/")
    for file in folder.glob("*.svg"):
        if file.name not in wanted:
            file.unlink()
    return len(wanted)
