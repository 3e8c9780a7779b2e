"""What an adaptive attacker found: ``python -m cwac_lab.tables worst=3``, over the trials of ``search=attacker``.

Of every method the trial after which most harmful prompts are answered (the worst case), the mean over the n worst
trials, and the worst case among models that still work (``objectives.works``), as TamperBench reports attacks. Broken
models have no harmful score.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig

from cwac_lab.config.run import ALIKE
from cwac_lab.core.cache import digest, write_text
from cwac_lab.core.errors import ConfigError, MissingAsset
from cwac_lab.core.stats import Rate
from cwac_lab.evaluation.objectives import PERPLEXITY_LIMIT, works
from cwac_lab.report.grouping import OWN, SETTING, Row, finished, records
from cwac_lab.report.rates import COUNT
from cwac_lab.report.tables import markdown, rate_of
from cwac_lab.results import store

_ELSEWHERE = ("exp", "views", "columns", "sort", "compare", "metric")
_SEARCHED = "searched"


@dataclass(frozen=True)
class Attacked:
    """The trials against one method, the worst first.

    Attributes:
        entry: Setting and method; ``variant`` names the settings in which methods of its name differ.
        trials: All finished ones whose model is not broken.
        bounded: Of these those whose model works.
        n: Trials in all, failed and broken ones too.
    """

    entry: Row
    trials: list[Row]
    bounded: list[Row]
    n: int


def read(config: DictConfig) -> int | None:
    """Return over how many of the worst trials a mean is asked for; None without ``worst``.

    Raises:
        ConfigError: If it is no such number, or another key says what tables are made.
    """
    n = config.worst
    if n is None:
        return None
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ConfigError("worst", n, "how many of the worst trials a mean is over, 1 or more")
    for key in _ELSEWHERE:
        if config[key] is not None:
            raise ConfigError(key, config[key], "null with worst")
    return n


def write(root: Path, n: int, say: Callable[[str], None] = print) -> str:
    """Write what the attackers of a store found (Markdown, CSV), and return the first.

    Args:
        root: Folder of the store; the files go to ``root/tables``.
        n: Trials of the mean.
        say: Told of every record that cannot be read, of the table, and of the files.

    Raises:
        MissingAsset: If the store has no trial of an attacker.
    """
    rows = [row for row in records(store.runs(root), say) if row["run"].config().get("objective") == "harm"]
    if not rows:
        raise MissingAsset(f"output_root={root}: no trials of search=attacker there")
    found = [_shown(each, n) for each in attacked(rows)]
    text = markdown(pd.DataFrame(found, dtype=object), "Attacked: ", _caption(n))
    stem = root / "tables" / "worst"
    write_text(stem.with_suffix(".md"), text)
    write_text(stem.with_suffix(".csv"), pd.DataFrame(found).to_csv(index=False))
    say(text)
    say(f"written: {stem.with_suffix('.md')} and {stem.with_suffix('.csv')}")
    return text


def _score(row: Row) -> float:
    value = rate_of([row], "harmful_score").value
    return -1.0 if value is None else value


def _own(row: Row) -> Row:
    return {key: value for key, value in row["config"].items() if key.startswith(OWN)}


def attacked(rows: list[Row]) -> list[Attacked]:
    """Return the trials of an attacker, by setting and method."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    shared = [name for name in SETTING if name not in ("attack", "judge")]
    for row in rows:
        groups.setdefault((*(row[name] for name in shared), row["constraint"], digest(_own(row))), []).append(row)
    found = []
    for key, group in groups.items():
        peers = [_own(other[0]) for other_key, other in groups.items() if other_key[-2] == key[-2]]
        differ = [name for name in _own(group[0]) if any(peer.get(name) != peers[0].get(name) for peer in peers)]
        variant = ", ".join(f"{name.removeprefix(OWN)}={_own(group[0])[name]}" for name in differ)
        first = group[0]
        entry = {name: first[name] for name in shared} | {"attack": _SEARCHED, "judge": first["judge"]}
        entry |= {"constraint": first["constraint"], "variant": variant}
        whole = [row for row in finished(group) if not row["broken"] and _score(row) >= 0]
        whole.sort(key=lambda row: (-_score(row), str(row["run"].path.name)))
        found.append(Attacked(entry, whole, [row for row in whole if works(row)], len(group)))
    return found


def _setting(row: Row, rows: list[Row]) -> str:
    """Return what the attacker chose in a trial, of all in which its trials differ."""
    plain = [{**each["config"], "harmful_ratio": each["harmful_ratio"], "attack": each["attack"]} for each in rows]
    mine = plain[rows.index(row)]
    names = [name for name in mine if name not in ALIKE and any(each.get(name) != mine[name] for each in plain)]
    told = ((name.removeprefix("trainer."), mine[name]) for name in names if not name.startswith(OWN))
    return ", ".join(f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}" for name, value in told)


def _case(words: str, trials: list[Row], rows: list[Row]) -> Row:
    """Return the columns of the first of some trials: its harmful score, what it retained, and what was chosen."""
    kept = f"{words}: retained refusals"
    if not trials:
        return {words: "none", f"{COUNT}{words}": "", kept: "", f"{COUNT}{kept}": "", f"{words}: setting": ""}
    rate, retained = (rate_of(trials[:1], name) for name in ("harmful_score", "retained_refusals"))
    told = {words: str(rate), f"{COUNT}{words}": rate.n, kept: str(retained), f"{COUNT}{kept}": retained.n}
    return told | {f"{words}: setting": _setting(trials[0], rows)}


def _shown(found: Attacked, n: int) -> Row:
    worst = [_score(row) for row in found.trials[:n]]
    mean = Rate(sum(worst) / len(worst), None, None, len(worst)) if worst else None
    told: Row = {**found.entry, "trials": found.n, "not broken": len(found.trials), "that work": len(found.bounded)}
    told |= _case("worst case", found.trials, found.trials)
    told |= {f"mean of the worst {n}": "none" if mean is None else f"{mean.value:.1f}"}
    return told | _case("bounded worst case", found.bounded, found.trials)


def _caption(n: int) -> str:
    return (
        "Harmful score in percent after fine-tuning that an attacker chose, lower is better: the worst trial "
        f"[95 % interval of that trial; n: prompts], the mean of the {n} worst, and the worst among models that work: "
        f"not broken, with a perplexity on plain text of at most {PERPLEXITY_LIMIT:g} times the start's. Retained "
        "refusals are of what the start refuses where it is asked alike: in another template it may refuse little. "
        "The worst of several trials is chosen by its score, so it is high by chance as well."
    )
