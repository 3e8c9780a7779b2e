"""Two methods of a store on the same prompts and seeds: ``python -m cwac_lab.tables compare=[weight,coupled]``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig, ListConfig

from cwac_lab.core.cache import digest, write_text
from cwac_lab.core.errors import ConfigError, LabError, MissingAsset
from cwac_lab.core.stats import Difference, Rate, paired_difference, sign_flip_p
from cwac_lab.evaluation.metrics import metric
from cwac_lab.report.differing import differing
from cwac_lab.report.grouping import OWN, SETTING, Row, finished, grouped, records
from cwac_lab.report.paired import alike, is_sound, otherwise, outcomes_of_pairs, shown_p, unlike
from cwac_lab.report.rates import COUNT, OF, checked, suites, title
from cwac_lab.report.tables import markdown, rate_of
from cwac_lab.results import store

Pairs = list[tuple[Row, Row]]
# Characters of a file's name before its end; the limit of a file system is 255 bytes.
LONGEST = 180
_ELSEWHERE = ("exp", "views", "columns", "sort")
# Where the settings of a method begin in its name: ``weight energy=0.9, layers=[1, 2]``.
_SETTING = re.compile(r",\s*(?=[\w.]+=)")
# What tells settings of one name apart.
_HASH = re.compile(r" [0-9a-f]{8}$")


@dataclass(frozen=True)
class Asked:
    """Which two methods are compared, and over which rate."""

    methods: tuple[str, str]
    rate: str

    @property
    def told(self) -> set[str]:
        """The settings of training that the methods' names tell."""
        return set(re.findall(r"((?:trainer|tuning|guard)\.\w+)=", " ".join(self.methods)))

    @property
    def name(self) -> str:
        """The name of its files."""
        name = "-".join(re.sub(r"[^\w.]+", "_", part).strip("_") for part in ("compare", *self.methods, self.rate))
        return name if len(name) <= LONGEST else f"{name[:LONGEST]}-{digest(name)[:8]}"


@dataclass(frozen=True)
class Found:
    """The comparison of two rows of a table over one rate.

    Attributes:
        entry: Setting and harmful ratio.
        rate: Name of the rate.
        variants: In which settings each method differs from others of its name.
        sides: The rate of each method, over the runs that are compared; pairs with a broken model are left out.
        difference: The first less the second, in points; None where no item counts on both sides.
        p: Of the exact sign-flip test; with one seed that is McNemar's.
        only: Answers that count towards the rate with the first method only, and with the second only, over all seeds.
        apart: The items of these answers: seed, verdicts, and texts where they are kept.
        why: Why there is no difference.
        otherwise: In which settings of training the two differ, beside the constraint.
    """

    entry: Row
    rate: str
    variants: tuple[str, str]
    sides: tuple[Rate, Rate]
    difference: Difference | None
    p: float | None
    only: tuple[int, int]
    apart: list[Row]
    why: str = ""
    otherwise: str = ""


def read(config: DictConfig) -> Asked | None:
    """Return what ``compare`` and ``metric`` ask for; None without ``compare``.

    Raises:
        ConfigError: If these are no two methods or no rate, or another key says what tables are made.
    """
    if config.compare is None:
        if config.metric is not None:
            raise ConfigError("metric", config.metric, "null without compare")
        return None
    given = list(config.compare) if isinstance(config.compare, ListConfig) else [config.compare]
    methods = [" ".join(str(method).split()) for method in given]
    if len(set(methods)) != 2 or len(methods) != 2:
        raise ConfigError("compare", config.compare, "two methods as tables name them, such as [weight,coupled]")
    for key in _ELSEWHERE:
        if config[key] is not None:
            raise ConfigError(key, config[key], "null with compare")
    rate = "harmful_score" if config.metric is None else checked("metric", config.metric)
    return Asked((methods[0], methods[1]), rate)


def write(root: Path, asked: Asked, say: Callable[[str], None] = print) -> str:
    """Write the comparison of two methods of a store (Markdown, CSV) and the prompts on which they differ (CSV).

    Args:
        root: Folder of the store; the files go to ``root/tables``.
        asked: The methods and the rate.
        say: Told of every record that cannot be read, of the tables, and of the files.

    Returns:
        The tables as Markdown.

    Raises:
        MissingAsset: If no run is finished.
        ConfigError: If a method is not recorded, or several are meant by one name.
        LabError: If there are no two runs to compare.
    """
    rows = records(store.runs(root), say)
    if not finished(rows):
        raise MissingAsset(f"output_root={root}: no finished runs there; run `python -m cwac_lab.train` first")
    found = compared(rows, asked)
    text = markdown(pd.DataFrame([_shown(each, asked) for each in found], dtype=object), "Compared: ", _caption(asked))
    numbers = pd.DataFrame([_numbers(each, asked) for each in found], dtype=object)
    apart = pd.DataFrame([item for each in found for item in each.apart])
    stem = root / "tables" / asked.name
    written = {".md": text, ".csv": numbers.to_csv(index=False), "-prompts.csv": apart.to_csv(index=False)}
    if apart.empty:
        del written["-prompts.csv"]
        stem.with_name(f"{stem.name}-prompts.csv").unlink(missing_ok=True)
    for end, content in written.items():
        write_text(stem.with_name(stem.name + end), content)
    say(text)
    say(f"written: {' and '.join(str(stem.with_name(stem.name + end)) for end in written if end != '-prompts.csv')}")
    if len(apart):
        without = int((apart["prompt"] == "").sum())
        texts = f", {without} of them without texts, which are not there beside the records" if without else ""
        say(f"answers that differ ({len(apart)}{texts}): {stem.with_name(stem.name + '-prompts.csv')}")
    else:
        say("answers that differ: none")
    return text


def compared(rows: list[Row], asked: Asked) -> list[Found]:
    """Return the comparisons of two methods: one a setting, harmful ratio and rate, that of every suite on its own.

    Raises:
        ConfigError: If a method is not recorded, or several are meant by one name.
        LabError: If there are no two runs to compare.
    """
    cells = [(entry, done) for entry, group in grouped(rows) if (done := finished(group))]
    ours, theirs = (_cells_of(method, cells) for method in asked.methods)
    found, reasons = [], []
    for first, second in _beside(ours, theirs, asked):
        pairs = [(a, b) for a in first[1] for b in second[1] if _fits(a, b, asked)]
        entry = second[0] if first[0]["constraint"] == "start" else first[0]
        if pairs:
            told = otherwise(*pairs[0], _baseline(*pairs[0]))
            found += [replace(_compare(entry, pairs, rate), otherwise=told) for rate in _rates(pairs, asked.rate)]
        else:
            seeds = [{int(row["seed"]) for row in side} for side in (first[1], second[1])]
            reasons.append(_why(first[1][0], second[1][0], seeds))
    if not found:
        why = reasons[0] if reasons else "none of both were made at one harmful ratio in one setting"
        raise LabError(f"compare={list(asked.methods)}: no two runs to compare: {why}")
    return found


def _cells_of(method: str, cells: list[tuple[Row, list[Row]]]) -> list[tuple[Row, list[Row]]]:
    """Return the rows of tables that a method's name fits."""
    found = [cell for cell in cells if _is_called(method, *cell)]
    if not found:
        names = dict.fromkeys(_name(entry) for entry, _ in cells)
        raise ConfigError("compare", method, f"a method that is recorded there: {' | '.join(names)}")
    return found


def _name(entry: Row) -> str:
    return f"{entry['constraint']} {entry['variant']}".strip()


def _is_called(method: str, entry: Row, group: list[Row]) -> bool:
    """Tell whether a row of a table goes by a name: its constraint, and any of its settings as ``KEY=VALUE``."""
    name = str(entry["constraint"])
    if method in (name, _name(entry)):
        return True
    if not method.startswith(f"{name} "):
        return False
    config = group[0]["config"] | group[0]["varied"]
    told = {f"{key.removeprefix(OWN)}={value}" for key, value in config.items()}
    told |= {_HASH.sub("", setting) for setting in told}
    return set(_SETTING.split(method.removeprefix(f"{name} "))) <= told


def _place(entry: Row, *, start: bool) -> tuple[Any, ...]:
    """Return what two rows that are compared share; a start has no ratio, and no attack on training."""
    keys = [key for key in SETTING if key != "attack"] if start else [*SETTING, "harmful_ratio"]
    return tuple(entry[key] for key in keys)


def _beside(
    first: list[tuple[Row, list[Row]]], second: list[tuple[Row, list[Row]]], asked: Asked
) -> Iterator[tuple[tuple[Row, list[Row]], tuple[Row, list[Row]]]]:
    """Yield the rows of tables that stand beside one another."""
    start = any(cell[0]["constraint"] == "start" for cell in (*first, *second))
    for mine in first:
        here = _place(mine[0], start=start)
        theirs = [cell for cell in second if _place(cell[0], start=start) == here]
        own = [cell for cell in first if _place(cell[0], start=start) == here]
        if not theirs:
            continue
        for method, cells in zip(asked.methods, (own, theirs), strict=True):
            at_once = {cell[0]["harmful_ratio"] for cell in cells}
            if len(cells) > len(at_once):
                raise ConfigError("compare", method, f"one of its variants: {' | '.join(_told_apart(cells))}")
        yield from ((mine, other) for other in theirs)


def _told_apart(cells: list[tuple[Row, list[Row]]]) -> list[str]:
    """Return the names of rows of tables, each with the settings in which they differ from one another."""
    varied = [(entry["constraint"], group[0]["varied"]) for entry, group in cells]
    keys = [key for key in varied[0][1] if len({str(told.get(key)) for _, told in varied}) > 1]
    names = (f"{name} " + ", ".join(f"{key}={told.get(key)}" for key in keys) for name, told in varied)
    return [f'"{name}"' for name in dict.fromkeys(names)]


def _baseline(a: Row, b: Row) -> str:
    return "start" if "start" in (a["constraint"], b["constraint"]) else "none"


def _fits(a: Row, b: Row, asked: Asked) -> bool:
    """Tell whether two runs share all that their difference is not to be due to, but for what the names tell."""
    ours, other = (b, a) if a["constraint"] == "start" else (a, b)
    return alike(ours, other, _baseline(a, b), asked.told)


def _why(first: Row, second: Row, seeds: list[set[int]]) -> str:
    """Return what keeps runs of two methods from being compared: settings, how they were asked, or seeds."""
    names = unlike(first, second, _baseline(first, second))
    told = [f"{name} {first['config'][name]} and {second['config'].get(name)}" for name in names]
    if not told and first["asking"] != second["asking"]:
        told = ["attack"]
    if told:
        named = [
            f"{name}={first['config'][name]}" for name in names if name.startswith(("trainer.", "tuning.", "guard."))
        ]
        more = f' (accepted: a name that tells it, "{first["constraint"]} {", ".join(named)}")' if named else ""
        return f"they were not trained and asked alike: {', '.join(told)}{more}"
    return "no seed is that of both: {} and {}".format(*(sorted(side) for side in seeds))


def _rates(pairs: Pairs, rate: str) -> list[str]:
    """Return a rate and, where prompts of suites were asked, that of each of them.

    Raises:
        ConfigError: If the rate is that of a suite that was not asked.
    """
    base = rate.partition(OF)[0]
    asked = [suites(row["verdicts"], metric(base).kinds) for pair in pairs for row in pair]
    known = [base, *(f"{base}{OF}{suite}" for suite in dict.fromkeys(name for names in asked for name in names))]
    if rate not in known:
        raise ConfigError("metric", rate, f"of these records: {' | '.join(known)}")
    return known if rate == base else [rate]


def _compare(entry: Row, pairs: Pairs, rate: str) -> Found:
    variants = (str(pairs[0][0]["variant"]), str(pairs[0][1]["variant"]))
    sound = [pair for pair in pairs if is_sound(pair, rate)]
    first, second = (rate_of(list({id(pair[at]): pair[at] for pair in sound}.values()), rate) for at in (0, 1))
    found = outcomes_of_pairs(sound, rate)
    if found is None:
        why = "no prompt counts with both" if sound else "a model is broken"
        return Found(entry, rate, variants, (first, second), None, None, (0, 0), [], f"n/a ({why})")
    items, ours, other = found
    apart: list[Row] = []
    for pair, mine, theirs in zip(sound, ours, other, strict=True):
        unequal = [item for item, a, b in zip(items, mine, theirs, strict=True) if a != b]
        apart += differing(entry, pair, rate, unequal)
    only = int((ours > other).sum()), int((ours < other).sum())
    difference, p = paired_difference(ours, other), sign_flip_p(ours, other)
    left_out = len(pairs) - len(sound)
    why = f"without {left_out} of {len(pairs)} pairs, which have a broken model" if left_out else ""
    return Found(entry, rate, variants, (first, second), difference, p, only, apart, why)


def _caption(asked: Asked) -> str:
    first, second = asked.methods
    return (
        f"{metric(asked.rate).words}. Percent: mean over seeds [95 % interval]; n: answers that count. Difference: "
        f"{first} less {second} in points [95 % interval] on the same items and seeds; p of the exact sign-flip test "
        "over items, which with one seed is McNemar's, not adjusted; n: items in each of so many seeds. Only: answers "
        "that count towards the rate with this method and not with the other, over all seeds. Runs were trained "
        "and asked alike; where a name tells another setting of training, the difference is due to it as well."
    )


def _shown(found: Found, asked: Asked) -> Row:
    told: Row = {key: found.entry[key] for key in (*SETTING, "harmful_ratio")} | {"rate": title(found.rate)}
    for name, variant, rate in zip(asked.methods, found.variants, found.sides, strict=True):
        told |= {f"variant of {name}": "" if name.endswith(variant) else variant}
        told |= {name: str(rate), f"{COUNT}{name}": rate.n}
    told |= {"trained otherwise": found.otherwise}
    if found.difference is None or found.p is None:
        return told | {"difference": found.why}
    told |= {"difference": str(found.difference), "p": shown_p(found.p), f"{COUNT}pairs": found.difference.n}
    only = {f"only {name}": count for name, count in zip(asked.methods, found.only, strict=True)}
    return told | {"seeds": found.difference.seeds, **only, "left out": found.why}


def _numbers(found: Found, asked: Asked) -> Row:
    """Return the comparison with one number a cell."""
    base, _, suite = found.rate.partition(OF)
    told: Row = {key: found.entry[key] for key in (*SETTING, "harmful_ratio")} | {"rate": base, "suite": suite}
    for side, name, variant, rate in zip(("first", "second"), asked.methods, found.variants, found.sides, strict=True):
        told |= {side: name, f"{side}_variant": variant, f"{side}_rate": rate.value}
        told |= {f"{side}_low": rate.low, f"{side}_high": rate.high, f"{side}_n": rate.n}
    told |= {"trained_otherwise": found.otherwise}
    if found.difference is not None:
        told |= {"difference": found.difference.value, "difference_low": found.difference.low}
        told |= {"difference_high": found.difference.high, "p": found.p, "n": found.difference.n}
        told |= {"seeds": found.difference.seeds, "only_first": found.only[0], "only_second": found.only[1]}
    return told
