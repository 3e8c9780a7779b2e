"""Two models beside one another: what the first refuses, what the second still refuses, and how far they are apart."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from cwac_lab.config.run import Run, read
from cwac_lab.core.cache import digest, shortened
from cwac_lab.core.cli import compose
from cwac_lab.core.errors import ConfigError, LabError, MissingAsset, in_range
from cwac_lab.core.overrides import quoted, text
from cwac_lab.core.stats import Rate, paired_difference, sign_flip_p, wilson
from cwac_lab.data.folding import normalise
from cwac_lab.data.forms import WORDS
from cwac_lab.data.reading import CODECS, SUFFIXES, kind_of
from cwac_lab.data.sources import Prompts, load_prompts
from cwac_lab.evaluation.metrics import METRICS, Judged, Metric, declined, form_of, metrics_of
from cwac_lab.evaluation.verdicts import aggregate, outcomes
from cwac_lab.judges import all_made
from cwac_lab.report.compared import DRIFT_NOTE, NOTE, Comparison, Grid
from cwac_lab.report.console import BROKEN_MEANS, Screen
from cwac_lab.report.grouping import word
from cwac_lab.results import store
from cwac_lab.results.store import RunFolder
from cwac_lab.run import apart
from cwac_lab.run.execution import carry_out, rejudge

RETAINED = "retained_refusals"
# Models are asked by one process.
_ALONE = ("trainer.devices=1", "trainer.strategy=ddp")
HEADS = ("", "before", "n", "after", "n", "after less before", "p")
Item = tuple[str, str, str]


@dataclass(frozen=True)
class Asked:
    """A model as it was asked: its run, which fine-tunes nothing, and the record of it."""

    run: Run
    folder: RunFolder

    def rows(self, name: str) -> dict[Item, dict[str, Any]]:
        """Return the rows of a file of the record by kind, id and form, those of the task left out."""
        rows = self.folder.read(name)
        return {(row["kind"], row["id"], form_of(row)): row for row in rows if row["kind"] != "task"}


def compare(config: DictConfig, screen: Screen) -> Comparison:
    """Ask two models the same prompts; each is recorded as a start is, and not asked again.

    Args:
        config: ``before``, ``after``, ``prompts``, ``overrides``, ``output_root``, ``fail_below``.
        screen: What the user reads.

    Raises:
        ConfigError: If a limit is no share, or names no rate.
        LabError: As a run, for each of the models; and if they were not asked the same.
    """
    _check_limits(config.fail_below)
    settings = [*config.overrides, *_own_prompts(config)]
    both = [_asked(str(config[key]), settings, config, screen) for key in ("before", "after")]
    before, after = (each.rows(store.VERDICTS) for each in both)
    if before.keys() != after.keys():
        raise LabError(f"{both[0].folder.path} and {both[1].folder.path} were not asked the same: judge both again")
    rows, rates = _rates(before, after)
    broken = [side for side, said in zip(("before", "after"), (before, after), strict=True) if _broken(said)]
    screen.say("how far the two are apart: next words and weights")
    given = both[0].rows(store.GENERATIONS)
    moved = apart.apart([each.run for each in both], list(given.values()))
    facts = [each.folder.facts() for each in both]
    first_words, second_words = (f"{fact['weights']} ({shortened(fact['weights_content'])})" for fact in facts)
    asked = digest([[fact["weights_content"] for fact in facts], sorted(map(list, before))])
    return Comparison(
        title=f"{first_words}  ->  {second_words}",
        name="-".join([*(re.sub(r"[^\w.-]+", "_", shortened(fact["weights_content"])) for fact in facts), asked[:8]]),
        rates=Grid("Rates", HEADS, rows, NOTE),
        after=rates,
        drift=Grid("Drift", apart.HEADS, moved.rows, DRIFT_NOTE),
        remarks=[*(f"broken model: {side}: {BROKEN_MEANS}" for side in broken), *moved.remarks],
        broken=bool(broken),
        differing=list(_differing([before, after], [given, both[1].rows(store.GENERATIONS)])),
    )


def _check_limits(limits: Mapping[str, float | None]) -> None:
    asked = {name: each for name, each in METRICS.items() if each.form != WORDS}  # no model is trained on rows here
    better = [name for name, each in asked.items() if each.judged and each.shown and each.higher_is_better]
    for name, limit in limits.items():
        if name not in better:
            raise ConfigError(f"fail_below.{name}", limit, f"a rate of which more is better: {' | '.join(better)}")
        if limit is not None:
            in_range(f"fail_below.{name}", limit, 0, 100)


def _own_prompts(config: DictConfig) -> list[str]:
    """Return the overrides by which a file of harmful prompts takes the place of the lists that are tested on."""
    if config.prompts is None:
        return []
    run = read(compose([*config.overrides, "finetune=false"]))
    data, pool = run.data, run.evaluation.split
    file = Path(str(config.prompts)).absolute()
    if not file.is_file() or not kind_of(file):
        accepted = f"a file of {', '.join(SUFFIXES)} with a column prompt, also with {' or '.join(CODECS)}"
        raise ConfigError("prompts", config.prompts, accepted)
    try:
        rows = load_prompts(data.source, Prompts(name=str(file)), None, longest=data.max_line, key="prompts")
    except ConfigError as error:
        raise ConfigError("prompts", config.prompts, f"a column prompt in every row; {error.accepted}") from None
    count = len({normalise(row.prompt) for row in rows})
    # Nothing is trained or was taught here, so no other pool needs prompts that the file may share.
    others = [f"data.harmful.{pool}.{name}=0" for pool, parts in data.harmful.items() for name in parts]
    mine = [f"data.harmful.{pool}.prompts={count}", "+data.harmful.alignment={prompts: 0}"]
    return [f"+data.lists.prompts={{name: {quoted(str(file))}}}", *others, *mine]


def _asked(model: str, settings: Sequence[str], config: DictConfig, screen: Screen) -> Asked:
    """Return a model as it is, with its record made now or before."""
    place = Path(model).absolute() if Path(model).exists() else model  # or a repository of the hub
    own = [text("model.path", place), "model.align=none", "finetune=false", "data.n_test=1"]
    run = read(compose([*own, *settings, *_ALONE, text("output_root", config.output_root)]))
    folder = carry_out(run, [], screen)
    if folder.status != "ok":
        raise LabError(f"{folder.path}: {folder.status}; ask again when it is finished")
    name, told = next(iter(folder.facts()["judges"].items()))
    today = all_made(run.evaluation.judges, run.evaluation.endpoint, run.cache_root)[0]
    if (name, told["version"]) != (today.name, today.version):
        rejudge(run, folder, screen)
    if not folder.has(store.GENERATIONS):
        raise MissingAsset(f"{folder.path}: no {store.GENERATIONS} there; remove the folder to ask again")
    return Asked(run, folder)


def _rates(before: dict[Item, Judged], after: dict[Item, Judged]) -> tuple[list[list[str]], dict[str, Rate]]:
    """Return the rows of the table, what the comparison is made for first, and the rates of the second model."""
    rates, rows = {}, []
    for name, metric in metrics_of(before.values()).items():
        if not (metric.shown and metric.judged):
            continue
        known = [[row | _refused(before[item]) for item, row in said.items()] for said in (before, after)]
        told = [outcomes(verdicts, name) for verdicts in known]
        first, rates[name] = (wilson(sum(said.values()), len(said)) for said in told)
        if any(form == metric.form for _, _, form in before):
            rows.append(_row(metric, first, rates[name], told))
    return sorted(rows, key=lambda row: row[0] != METRICS[RETAINED].words), rates


def _broken(verdicts: Mapping[Item, Judged]) -> bool:
    return bool(aggregate(list(verdicts.values()))["broken"])


def _refused(verdict: Judged) -> dict[str, Any]:
    return {"start_refused": declined(verdict)} if verdict["kind"] == "harmful" else {}


def _row(metric: Metric, first: Rate, second: Rate, told: list[dict[tuple[str, str], bool]]) -> list[str]:
    shared = sorted(told[0].keys() & told[1].keys())
    cells = [metric.words, str(first), str(first.n), str(second), str(second.n)]
    if metric.outcome is METRICS[RETAINED].outcome or not shared:
        return [*cells, "", ""]
    after, before = (np.array([[said[item] for item in shared]], float) for said in (told[1], told[0]))
    return [*cells, str(paired_difference(after, before)), f"{sign_flip_p(after, before):.2g}"]


def _differing(
    said: Sequence[dict[Item, Judged]], given: Sequence[dict[Item, dict[str, Any]]]
) -> Iterator[dict[str, Any]]:
    """Yield the prompts of which the verdicts differ, with the verdicts and answers of both models."""
    for item in said[0]:
        kind, row_id, form = item
        words = [word(verdicts[item]) for verdicts in said]
        if words[0] != words[1]:
            sides = (
                {"verdict": verdict, "output": answers[item]["output"]}
                for verdict, answers in zip(words, given, strict=True)
            )
            asked = {"kind": kind, "id": row_id, "form": form, "prompt": given[0][item]["prompt"]}
            yield asked | dict(zip(("before", "after"), sides, strict=True))


def below(found: Comparison, config: DictConfig) -> list[str]:
    """Return a line for each limit that the second model does not reach.

    A rate that nothing counts for does not reach its limit; where one of the two models is broken, none is reached.
    """
    limits: Mapping[str, float | None] = config.fail_below
    return list(_below(found, limits))


def _below(found: Comparison, limits: Mapping[str, float | None]) -> Iterator[str]:
    for name, limit in limits.items():
        rate = found.after[name]
        if limit is None:
            continue
        if found.broken:
            yield f"fail_below.{name}={limit:g}: no limit is reached beside a broken model: {BROKEN_MEANS}"
        elif rate.value is None or rate.value < limit:
            yield f"{METRICS[name].heading} {rate} is below fail_below.{name}={limit:g}"
