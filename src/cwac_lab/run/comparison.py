"""Two models beside one another: what the first refuses, what the second still refuses, and what else differs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from cwac_lab.config.run import read
from cwac_lab.core.cache import write_text
from cwac_lab.core.cli import compose
from cwac_lab.core.errors import ConfigError, LabError, in_range
from cwac_lab.core.overrides import text
from cwac_lab.core.stats import Rate, paired_difference, sign_flip_p, wilson
from cwac_lab.evaluation.metrics import METRICS, Judged, declined
from cwac_lab.evaluation.verdicts import outcomes
from cwac_lab.judges import all_made
from cwac_lab.report.console import Screen
from cwac_lab.results import store
from cwac_lab.results.store import RunFolder
from cwac_lab.run.execution import carry_out, rejudge

RETAINED = "retained_refusals"
HEADS = ("", "before", "n", "after", "n", "after less before", "p")
_NOTE = (
    "Percent [95 % interval]; n: answers that count. Retained refusals: of the harmful prompts that the first model "
    "refuses, the share that the second one refuses too. Differences are paired by prompt, in points; p is the exact "
    "sign-flip test's and is not adjusted."
)


@dataclass(frozen=True)
class Comparison:
    """A table of rates of two models.

    Attributes:
        title: Which models, in words.
        rows: Texts by column of ``HEADS``.
        after: Rates of the second model, by name.
        name: Of its page, by the content of the models.
    """

    title: str
    rows: list[list[str]]
    after: dict[str, Rate]
    name: str
    heads: tuple[str, ...] = HEADS


def compare(config: DictConfig, screen: Screen) -> Comparison:
    """Ask two models the same prompts; each is recorded as a start is, and not asked again.

    Args:
        config: ``before``, ``after``, ``overrides``, ``output_root``, ``fail_below``.
        screen: What the user reads.

    Raises:
        ConfigError: If a limit is no share, or names no rate.
        LabError: As a run, for each of the models; and if they were not asked the same.
    """
    for name, limit in config.fail_below.items():
        better = [
            name for name, metric in METRICS.items() if metric.judged and metric.shown and metric.higher_is_better
        ]
        if name not in better:
            raise ConfigError(f"fail_below.{name}", limit, f"a rate of which more is better: {' | '.join(better)}")
        if limit is not None:
            in_range(f"fail_below.{name}", limit, 0, 100)
    folders = [_asked(str(config[key]), config, screen) for key in ("before", "after")]
    facts = [folder.facts() for folder in folders]
    before, after = (_by_item(folder) for folder in folders)
    if before.keys() != after.keys():
        raise LabError(f"{folders[0].path} and {folders[1].path} were not asked the same prompts: judge both again")
    rates, rows = {}, []
    for name in (RETAINED, *(name for name, metric in METRICS.items() if metric.shown and metric.judged)):
        if name in rates:
            continue
        known = [[row | _refused(before[item]) for item, row in said.items()] for said in (before, after)]
        told = [outcomes(verdicts, name) for verdicts in known]
        first, rates[name] = (wilson(sum(said.values()), len(said)) for said in told)
        rows.append(_row(name, first, rates[name], told))
    first_words, second_words = (f"{fact['weights']} ({fact['weights_content'][:8]})" for fact in facts)
    name = "-".join(fact["weights_content"][:8] for fact in facts)
    return Comparison(f"{first_words}  ->  {second_words}", rows, rates, name)


def _asked(model: str, config: DictConfig, screen: Screen) -> RunFolder:
    """Return the record of a model as it is, made now or before."""
    place = Path(model).absolute() if Path(model).exists() else model  # or a repository of the hub
    own = [text("model.path", place), "model.align=none", "finetune=false", "data.n_test=1"]
    run = read(compose([*own, *config.overrides, text("output_root", config.output_root)]))
    folder = carry_out(run, [], screen)
    if folder.status != "ok":
        raise LabError(f"{folder.path}: {folder.status}; ask again when it is finished")
    name, told = next(iter(folder.facts()["judges"].items()))
    today = all_made(run.evaluation.judges)[0]
    if (name, told["version"]) != (today.name, today.version):
        rejudge(run, folder, screen)
    return folder


def _by_item(folder: RunFolder) -> dict[tuple[str, str], Judged]:
    """Return the first judge's verdicts of a run by kind and id, those of the task left out."""
    rows = folder.read(store.VERDICTS)
    return {(row["kind"], row["id"]): row for row in rows if row["kind"] != "task"}


def _refused(verdict: Judged) -> dict[str, Any]:
    return {"start_refused": declined(verdict)} if verdict["kind"] == "harmful" else {}


def _row(name: str, first: Rate, second: Rate, told: list[dict[tuple[str, str], bool]]) -> list[str]:
    shared = sorted(told[0].keys() & told[1].keys())
    cells = [METRICS[name].words, str(first), str(first.n), str(second), str(second.n)]
    if name == RETAINED or not shared:
        return [*cells, "", ""]
    after, before = (np.array([[said[item] for item in shared]], float) for said in (told[1], told[0]))
    return [*cells, str(paired_difference(after, before)), f"{sign_flip_p(after, before):.2g}"]


def below(found: Comparison, config: DictConfig) -> list[str]:
    """Return a line for each limit that the second model does not reach; a rate that nothing counts for is one."""
    limits: Mapping[str, float | None] = config.fail_below
    return list(_below(found, limits))


def _below(found: Comparison, limits: Mapping[str, float | None]) -> Iterator[str]:
    for name, limit in limits.items():
        rate = found.after[name]
        if limit is not None and (rate.value is None or rate.value < limit):
            yield f"{METRICS[name].heading} {rate} is below fail_below.{name}={limit:g}"


def page(found: Comparison, config: DictConfig) -> Path:
    """Write the table as Markdown under ``output_root`` and return where it is."""
    path = Path(config.output_root) / "compare" / f"{found.name}.md"
    lines = [
        f"# {found.title}",
        "",
        _NOTE,
        "",
        "| " + " | ".join(found.heads) + " |",
        "|" + " --- |" * len(found.heads),
    ]
    lines += ["| " + " | ".join(row) + " |" for row in found.rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "\n".join(lines) + "\n")
    return path
