"""Records of runs, grouped into the rows of tables; read from the store only."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from cwac_lab.config.run import ALIKE, requirements
from cwac_lab.core.cache import digest
from cwac_lab.core.errors import LabError
from cwac_lab.data.attacks import ASKING
from cwac_lab.evaluation.verdicts import Verdicts
from cwac_lab.report.rates import counted
from cwac_lab.results import store
from cwac_lab.results.later import FORM_BEFORE
from cwac_lab.results.schema2 import THEN
from cwac_lab.results.store import Record

Row = dict[str, Any]
# What the runs of a table share: weights, task, source of data, its rows and prompts by content, by which rule prompts
# were dealt to pools, split, attack, judge.
SETTING = ["weights", "weights_content", "task", "data", "task_rows", "prompts", "dealt", "split", "attack", "judge"]
# What the runs of a mean over tasks share.
ACROSS_TASKS = ["weights", "weights_content", "data", "prompts", "dealt", "split", "attack", "judge"]
_NEAR = "data.near"
# The attack that headings need not name.
PLAIN_ATTACK = "mixed"
ROW = ["harmful_ratio", "constraint", "variant"]
_ORDER = ("start", "none", "weight", "activation", "coupled")
OWN = "constraint."
_RESTORE = "constraint.weight.restore_every_n_steps"
_CONFIGURED = ("constraint", "trainer", "task", "data", "align", "evaluation", "sae", "tuning")


def records(runs: Iterable[Record], say: Callable[[str], None] = print) -> list[Row]:
    """Return one row a run that ended: its facts, its flattened configuration under ``config``, and its folder.

    A finished run has its metrics; a failed one has ``failed``, the reason, instead. Runs that are under way, were
    interrupted, or failed before they had weights are left out.

    Args:
        runs: Recorded runs.
        say: Told of every record that cannot be read; the others count all the same.
    """
    found = []
    for run in runs:
        try:
            status = run.status
            if status == "ok" or (status == "failed" and run.has(store.PROVENANCE)):
                found.append(_row(run, failed=status == "failed"))
        except (LabError, OSError, ValueError, KeyError) as error:
            say(f"left out: {run.path.name}: {error}")
    for row in (row for row in found if "failed" in row):
        row["judge"] = _judge_of_peers(row, found)
    return found


def _judge_of_peers(row: Row, rows: list[Row]) -> str:
    """Return who judged the runs that a failed one, which nobody judged, shares a table with; else who it names."""
    for setting in (SETTING, ACROSS_TASKS):
        alike = [name for name in setting if name != "judge"]
        for peer in rows:
            if "failed" not in peer and all(peer[name] == row[name] for name in alike):
                return str(peer["judge"])
    return str(row["run"].config()["evaluation"]["judges"][0])


def _row(run: Record, *, failed: bool) -> Row:
    row: Row = {**run.facts(), "run": run}
    config, provenance = run.config(), run.provenance()
    row |= {"task_rows": provenance["task_data_sha256"][:8], "prompts": provenance["pools_sha256"][:8]}
    if failed:
        row["failed"] = run.told().get("reason", "no reason given")
    else:
        row["verdicts"] = Verdicts(run.read(store.VERDICTS))
    row |= {"attack": _attack(config["attack"], row["constraint"]), "judge": "" if failed else store.judged_by(row)}
    row["asking"] = digest([config["attack"][name] for name in ASKING])
    kept = store.flat({group: config.get(group) for group in _CONFIGURED})
    kept["model.chat_template"] = config.get("model", {}).get("chat_template")
    guard = config.get("guard") or {"kl": None}
    kept |= {f"guard.{name}": value for name, value in guard.items() if name == "kl" or guard["kl"] is not None}
    projection = kept.get("constraint.weight.projection")
    if projection is not None:  # with update, weights are restored after every step
        kept[_RESTORE] = {"update": 1, "gradient": "never"}.get(projection, kept[_RESTORE])
    row["dealt"] = kept.pop(_NEAR)
    forms = _named(config["forms"])
    kept["forms"] = forms["name"] if forms == THEN["forms"] else f"{forms['name']} {digest(forms)[:8]}"
    row["config"] = {key: value for key, value in kept.items() if not key.startswith(_idle(row, config))}
    return row


# What an attack without these settings did, as in records of before them.
_LATER = {"abliterate": False}


def _named(forms: dict[str, Any]) -> dict[str, Any]:
    """Return forms without settings that came later and say what was done before: hashes of them stay."""
    others = {
        name: {key: value for key, value in form.items() if key not in FORM_BEFORE or value != FORM_BEFORE[key]}
        for name, form in forms["others"].items()
    }
    return {**forms, "others": others}


def _without_later(attack: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attack.items() if name not in _LATER or value != _LATER[name]}


def _attack(attack: dict[str, Any], constraint: str) -> str:
    """Return the name of a run's attack, with a hash where its settings are not those of a run without one.

    A start is not trained: of an attack it knows how it is asked.
    """
    plain, attack = (_without_later(each) for each in (THEN["attack"], attack))
    if attack == plain or (constraint == "start" and all(attack[name] == plain[name] for name in ASKING)):
        return str(plain["name"])
    return f"{attack['name']} {digest(attack)[:8]}"


def _idle(row: Row, config: dict[str, Any]) -> tuple[str, ...]:
    """Return the settings that a run did not use: rows that differ in them only are one row."""
    if row["constraint"] == "start":
        return ("sae.", "data.reference", "forms", "constraint.", "trainer.", "tuning.", "guard.")
    if "failed" in row:
        needs = requirements(config["constraint"])
        features, reference = needs.features is not None, needs.reference_prompts
    else:
        prepared = row.get("prepared", {})
        features, reference = "features" in prepared, "reference" in prepared
    return (*(() if features else ("sae.",)), *(() if reference else ("data.reference", "forms")))


def _varied(rows: list[Row], setting: list[str]) -> list[dict[str, Any]]:
    """Return, for each row, its values of the settings in which rows of its constraint differ.

    A setting of the constraint that a record does not know is ``unset`` there: what ran is not known to be the same.
    """
    found = []
    for row in rows:
        peers = [peer["config"] for peer in rows if all(peer[key] == row[key] for key in [*setting, "constraint"])]
        known = dict.fromkeys(key for peer in peers for key in peer if key in row["config"] or key.startswith(OWN))
        keys = [key for key in known if key not in ALIKE and _differs(peers, key)]
        found.append({key.removeprefix(OWN): row["config"].get(key, "unset") for key in keys})
    if "task" not in setting:
        found = [{key: value for key, value in varied.items() if not key.startswith("task.")} for varied in found]
    return found


def _differs(configs: list[dict[str, Any]], key: str) -> bool:
    own = key.startswith(OWN)
    values = [config.get(key, "unset") for config in configs if own or key in config]
    return any(value != values[0] for value in values)


def place(entry: Row) -> tuple[Any, ...]:
    """Return the key that sorts rows of tables: setting, start, then ratio, constraint and variant."""
    order = {name: number for number, name in enumerate(_ORDER)}
    return (
        *(str(entry[key]) for key in SETTING if key in entry),
        -1.0 if entry["constraint"] == "start" else entry["harmful_ratio"],
        order.get(str(entry["constraint"]), len(order)),
        str(entry["constraint"]),
        str(entry["variant"]),
    )


def grouped(rows: list[Row], setting: list[str] = SETTING) -> list[tuple[Row, list[Row]]]:
    """Return what a table has a row of (setting, harmful ratio, constraint, variant), in order, with its runs.

    No two settings of a constraint share a row: ``variant`` names those that differ. Every run is told its ``variant``,
    and as ``varied`` its values of them.

    Args:
        rows: Records.
        setting: What the rows of one table share.

    Raises:
        LabError: If two records of a row have one seed, which would then count twice.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row, varied in zip(rows, _varied(rows, setting), strict=True):
        row["varied"] = varied
        row["variant"] = ", ".join(f"{key}={value}" for key, value in varied.items())
        groups.setdefault(tuple(row[key] for key in [*setting, *ROW]), []).append(row)
    found = [(dict(zip([*setting, *ROW], key, strict=True)), _one_a_seed(group)) for key, group in groups.items()]
    return sorted(found, key=lambda pair: place(pair[0]))


def _one_a_seed(group: list[Row]) -> list[Row]:
    """Return the runs of a row; of starts one a task, since no seed enters them."""
    found: dict[tuple[Any, ...], Row] = {}
    start = group[0]["constraint"] == "start"
    for row in group:
        twin = found.setdefault((row["task"], row["task_rows"], None if start else row["seed"]), row)
        if twin is not row and not start:
            raise LabError(f"{twin['run'].path} and {row['run'].path} are one cell with one seed: remove one of them")
    return list(found.values())


def finished(group: list[Row]) -> list[Row]:
    """Return the runs of a row that have figures."""
    return [row for row in group if "failed" not in row]


def has_rate(rows: list[Row], rate: str) -> bool:
    """Tell whether any answer counts for a rate in any of the finished runs; records of before a rate have none."""
    return any(counted(row["verdicts"], rate) for row in finished(rows))


def said(run: Record) -> list[dict[str, Any]]:
    """Return what all judges of a run say of every answer, and their reasons, by name; ``task`` is the answer key.

    ``form`` tells in which form a prompt was asked, where there are several; ``suite`` and ``category`` what it is of.
    """
    others = {Path(file).stem.removeprefix("verdicts-"): run.read(file) for file in run.verdict_files()[1:]}
    rows = []
    for number, first in enumerate(run.read(store.VERDICTS)):
        verdicts = {first.get("judge", "task"): first}
        verdicts |= {name: found[number] for name, found in others.items() if first["kind"] != "task"}
        words = {name: word(verdict) for name, verdict in verdicts.items()}
        reasons = {name: verdict.get("reason", "") for name, verdict in verdicts.items()}
        item = {name: first[name] for name in ("kind", "id", "form", "suite", "category") if name in first}
        rows.append({**item, "said": words, "reasons": reasons})
    return rows


def word(verdict: dict[str, Any]) -> str:
    """Return a verdict in a word."""
    if "correct" in verdict:
        return {True: "correct", False: "wrong", None: "not scored"}[verdict["correct"]]
    return next((field for field in ("incoherent", "refused", "complied") if verdict.get(field)), "unknown")
