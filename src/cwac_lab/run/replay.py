"""A recorded run made again: how its outcome differs, and whether what differs beside it can be the reason."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cwac_lab.config.run import ALIKE, Run, read
from cwac_lab.core.errors import ConfigError, LabError
from cwac_lab.core.overrides import parsed
from cwac_lab.evaluation.metrics import METRICS, form_of
from cwac_lab.report.console import Screen
from cwac_lab.report.grouping import said
from cwac_lab.results.store import Record, RunFolder, flat
from cwac_lab.run.execution import carry_out

# How much a difference explains, from little to much.
SAME, ROUNDING, OTHER = "same", "rounding may differ", "other inputs"
# What goes into a run, and what only computes it, in provenance.
_INPUTS = (
    *("weights_content", "base_content", "task_data_sha256", "pools_sha256"),
    *("attack_rows_sha256", "own_sources"),
)
_MACHINE = ("python", "packages", "platform", "cpu_count", "torch_threads", "devices")
# A replay is one process, which tells no tracker and saves no model unless it is asked to.
_ALONE = {"trainer": {"devices": 1, "strategy": "ddp", "export": False}, "logger": {"wandb": "off"}}
Table = tuple[list[str], list[list[str]]]


def composed(record: Record, root: Path, overrides: Sequence[str]) -> Run:
    """Return the configuration of a recorded run, to be carried out under another folder by one process.

    Args:
        record: A finished run.
        root: The output folder.
        overrides: Of settings that change no result.

    Raises:
        ConfigError: If the run is not finished or is one of the very folder, or an override is of another setting.
    """
    if record.status != "ok":
        raise ConfigError("run", record.path, f"a finished run (this one is {record.status})")
    if isinstance(record, RunFolder) and record.path.resolve().parent == (root / "runs").resolve():
        raise ConfigError("output_root", root, "another folder than that of the record, which stays as it is")
    settings = OmegaConf.create(record.config())
    settings.merge_with({"cache_root": str(root / "cache")})
    settings.merge_with(_ALONE)
    for override in parsed(overrides):
        key = str(override.key_or_group)
        if not any(key == alike or key.startswith(f"{alike}.") for alike in ALIKE):
            raise ConfigError("overrides", key, f"settings that change no result: {' | '.join(ALIKE)}")
        OmegaConf.update(settings, key, override.value())
    settings.merge_with({"output_root": str(root), "force": False})
    return read(settings, recorded=True)


def repeated(record: Record, asked: DictConfig, screen: Screen) -> RunFolder:
    """Carry a recorded run out again, unless it is already, and return the new record.

    Raises:
        LabError: If weights or data are missing, or another process is on it.
    """
    folder = carry_out(composed(record, Path(asked.output_root), list(asked.overrides)), [], screen)
    if folder.status != "ok":
        raise LabError(f"{folder.path}: {folder.status}; ask again when it is finished")
    return folder


def outcome(record: Record, again: Record) -> Table:
    """Return a row a rate, and one of the verdicts: recorded, now, the difference in points, whether intervals overlap.

    Verdicts are those of the first judge and the answer key; they differ by the ids of what was asked.
    """
    then, now = record.facts(), again.facts()
    rows = []
    for name, metric in METRICS.items():
        a, b = (facts.get(name) for facts in (then, now))
        if a is not None and b is not None:
            rows.append([metric.words, _rate(a), _rate(b), *_apart(a, b)])
    before, after = ({_item(row): _first(row) for row in said(run)} for run in (record, again))
    common = before.keys() & after.keys()
    differ = sum(before[item] != after[item] for item in common)
    alone = f", {len(before) + len(after) - 2 * len(common)} asked once only" if before.keys() != after.keys() else ""
    rows.append(["verdicts", str(len(before)), str(len(after)), f"{differ} of {len(common)} differ{alone}", ""])
    return ["", "recorded", "now", "difference", "intervals overlap"], rows


def environment(record: Record, again: Record) -> Table:
    """Return what differs beside the outcome, a row each, with how much it explains; judges count as inputs."""
    changes = list(_changes(record, again))
    return ["", "recorded", "now", "so"], [[name, _short(a), _short(b), weight] for name, a, b, weight in changes]


def grade(changes: Sequence[Sequence[str]]) -> str:
    """Return the gravest of the changes that ``environment`` returned."""
    return max((change[-1] for change in changes), key=(SAME, ROUNDING, OTHER).index, default=SAME)


def _changes(record: Record, again: Record) -> Iterator[tuple[str, Any, Any, str]]:
    then, now = record.provenance(), again.provenance()
    code = "sources" if "sources" in then and "sources" in now else "git_commit"
    if then.get(code) != now.get(code) or (code == "git_commit" and (then.get("git_dirty") or now.get("git_dirty"))):
        yield "code", _commit(then), _commit(now), OTHER
    for name in _INPUTS:
        if name not in then and "made_under" in then:
            continue  # earlier records do not tell it
        if (then.get(name) or None) != (now.get(name) or None):
            yield name, then.get(name), now.get(name), OTHER
    yield from _differing("judge ", _judges(record), _judges(again), OTHER)
    a, b = ({name: each.get(name) for name in _MACHINE} for each in (then, now))
    yield from _differing("", a, b, ROUNDING)


def _judges(run: Record) -> dict[str, str]:
    """Return the versions of a run's judges by name."""
    return {name: told["version"] for name, told in run.facts()["judges"].items()}


def _differing(
    words: str, then: dict[str, Any], now: dict[str, Any], weight: str
) -> Iterator[tuple[str, Any, Any, str]]:
    a, b = flat(then), flat(now)
    for name in dict.fromkeys([*a, *b]):
        if a.get(name) != b.get(name):
            yield f"{words}{name}", a.get(name), b.get(name), weight


def _commit(provenance: dict[str, Any]) -> str:
    commit = str(provenance.get("git_commit") or "no commit")[:8]
    return f"{commit} with changes" if provenance.get("git_dirty") else commit


def _short(value: Any) -> str:
    """Return a value as text; of a hash the beginning."""
    text = "-" if value is None else str(value)
    return text[:8] if len(text) == 64 and text.isalnum() else text


def _rate(rate: dict[str, Any]) -> str:
    if rate["value"] is None:
        return f"n/a (n={rate['n']})"
    return f"{rate['value']:.1f} [{rate['low']:.1f}, {rate['high']:.1f}] (n={rate['n']})"


def _apart(then: dict[str, Any], now: dict[str, Any]) -> tuple[str, str]:
    if then["value"] is None or now["value"] is None:
        return "", ""
    overlap = then["low"] <= now["high"] and now["low"] <= then["high"]
    return f"{now['value'] - then['value']:+.1f}", "yes" if overlap else "no"


def _item(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["kind"], row["id"], form_of(row)


def _first(row: dict[str, Any]) -> str:
    """Return the verdict of the first judge, or of the answer key."""
    return str(next(iter(row["said"].values())))
