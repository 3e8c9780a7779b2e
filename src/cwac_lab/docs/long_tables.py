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
from typing import Any

import pandas as pd
import yaml

from cwac_lab.core.errors import MissingAsset
from cwac_lab.diagnostics.evidence import PREFIX, correlations
from cwac_lab.docs import judged, starts
from cwac_lab.report.files import NOTE, page
from cwac_lab.report.grouping import Row, has_rate, records
from cwac_lab.report.paired import compare, shown_p
from cwac_lab.report.rates import title
from cwac_lab.report.views import views
from cwac_lab.results import load, select

VIEWS, PAIRS = "tables.yaml", "pairs.yaml"
_COMPARED = ("harmful_score", "retained_refusals", "finetune_accuracy", "over_refusal", "over_refusal_lookalike")
# Settings that tell measured runs apart, and what most of them have.
_USUAL: dict[str, float | None] = {
    "trainer.learning_rate": 1e-4, "trainer.epochs": 2, "data.n_train": 400, "harmful_ratio": 0.2,
    "constraint.weight.gradient_share": 1.0, "constraint.kl.strength": None, "constraint.l2.strength": 30.0,
}  # fmt: skip
_CALLED = {"attack.name": "mixed", "forms.name": "own"}
# Experiments whose runs were measured inside, in the order in which their correlations were published.
MEASURED = ("sst2_tuned", "sst2_attacks", "sst2_between")
_TITLE = re.compile(r"((?:^# .*\n)+)^(\w+):", re.MULTILINE)
_SECTION = re.compile(r"^## (\w+)\n\n(.+)$", re.MULTILINE)
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


def experiment(folder: Path) -> str:
    """Return the page of an experiment: a section a table, and one of the methods that are compared."""
    where, titles = f"experiments/{folder.name}", _titles(folder / VIEWS)
    command = f"    python -m cwac_lab.tables output_root={where} views={where}/{VIEWS}"
    parts = [f"# {folder.name}\n\nMade by `make docs` of the records in `{where}`, as by\n\n{command}\n"]
    for name, query in views(str(folder / VIEWS)).items():
        words = f"{titles[name][0].upper()}{titles[name][1:]}."
        parts.append(f"## {name}\n\n{words}\n\n{page(rows_of(folder, name, str(query)), name)}")
    if (folder / PAIRS).is_file():
        parts.append(pairs(folder))
    return "\n".join(parts)


def pairs(folder: Path) -> str:
    """Return the section of the methods of an experiment that are compared with one another."""
    told = yaml.safe_load((folder / PAIRS).read_text(encoding="utf-8"))
    lines = [
        "## pairs\n",
        f"Methods beside one another: the queries of `{PAIRS}`, compared by `cwac_lab.report.paired.compare`.\n",
        "Points [95 % interval], the first method less the second, on the same items and seeds; ↓ below zero is "
        "better, ↑ above zero is better. The interval is over seeds and items. p is the exact sign-flip test's over "
        "items: it takes the seeds as given and is not adjusted. n: items in each seed.\n",
        "| pair | rate | difference | p | n | seeds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, (ours, other) in told.items():
        mine, theirs = rows_of(folder, name, ours), rows_of(folder, name, other)
        for rate in _COMPARED:
            if not (has_rate(mine, rate) and has_rate(theirs, rate)):
                continue
            found, p = compare(mine, theirs, rate)
            lines.append(f"| {name} | {title(rate)} | {found} | {shown_p(p)} | {found.n} | {found.seeds} |")
    return "\n".join(lines) + f"\n\n{NOTE}\n"


def drift(experiments: Path) -> str:
    """Return the page of what was measured inside models: a row a run, and what goes with the harmful score."""
    frame = pd.concat([load(experiments / name).assign(experiment=name) for name in MEASURED], ignore_index=True)
    frame = frame[frame[f"{PREFIX}total"].notna()]
    roots = ",".join(f"experiments/{name}" for name in MEASURED)
    named = [str(name) for name in frame if frame[name].notna().any()]
    columns = [name.removeprefix(PREFIX) for name in named if name.startswith(PREFIX)]
    lines = [
        "# What moved inside: every run that was measured\n",
        "Made by `make docs` of the records; correlations as by\n",
        f"    python -m cwac_lab.diagnose 'output_root=[{roots}]'\n",
        "Means over layers on harmful prompts of the test pool, relative to the start. What each column is: "
        "[evidence.md](../evidence.md#what-is-measured). HS: harmful score in percent, lower is better; kl, benign: KL "
        "on harmless prompts; weight, activation and cross are the parts by the weights, by their input and by both.\n",
        "| experiment | constraint | setting | seed | HS | " + " | ".join(columns) + " | kl, benign |",
        "| --- " * (6 + len(columns)) + "|",
    ]
    for _, run in frame.iterrows():
        told = [
            f"{key.removeprefix('constraint.')}={run[key]:g}"
            for key, usual in _USUAL.items()
            if _unusual(run, key, usual)
        ]
        told += [f"{key.partition('.')[0]}={run[key]}" for key, usual in _CALLED.items() if run[key] != usual]
        values = [_digits(run[PREFIX + name]) for name in columns] + [_digits(run["drift_benign_kl"])]
        cells = [
            run["experiment"],
            run["constraint"],
            ", ".join(told),
            f"{run['seed']:g}",
            f"{run['harmful_score']:.1f}",
        ]
        lines.append("| " + " | ".join([*cells, *values]) + " |")
    lines += [
        "\nSpearman's rank correlation with the harmful score over the runs that are not broken, with a bootstrap "
        "interval over runs (95 %):\n",
        "| measurement | rho | runs |",
        "| --- | --- | --- |",
    ]
    for _, row in correlations(frame).iterrows():
        rho = f"{row['rho']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]"
        lines.append(f"| {row['measurement']} | {rho} | {row['n']} |")
    return "\n".join(lines) + "\n"


def _unusual(run: Any, key: str, usual: float | None) -> bool:
    return key in run and not pd.isna(run[key]) and run[key] != usual


def _digits(value: float) -> str:
    return "" if pd.isna(value) else f"{value:.3g}"


def pages(experiments: Path) -> dict[str, str]:
    """Return the text of every file of ``docs/tables``, by name; the index is ``README.md``."""
    found = {f"{file.parent.name}.md": experiment(file.parent) for file in sorted(experiments.glob(f"*/{VIEWS}"))}
    found |= {"drift.md": drift(experiments), "judges.md": judged.page(experiments), "start.md": starts.page()}
    lines = ["# Long tables\n", "Made by `make docs` of the records that travel with the project.\n"]
    for name, text in sorted(found.items()):
        lines.append(f"- [{text.splitlines()[0].removeprefix('# ')}]({name})")
        for section, words in _SECTION.findall(text):
            lines.append(f"    - [{section}]({name}#{section}): {words[0].lower()}{words[1:]}")
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
    if judged.FIGURE in wanted:
        judged.draw(experiments, folder / judged.FIGURE)
    missing = wanted - {judged.FIGURE}
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
