"""Whose verdicts rates are, by name and version: told wherever rates are shown, and never two in one row."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from cwac_lab.diagnostics.evidence import correlations
from cwac_lab.judges import JUDGES
from cwac_lab.judges.endpoint import EndpointConfig
from cwac_lab.report.grouping import records
from cwac_lab.report.tables import markdown, summary
from cwac_lab.results import load
from cwac_lab.results.store import runs
from cwac_lab.run import afterwards
from support.recorded import record

OLD, NEW = "aaaaaaaa00000000", "bbbbbbbb00000000"


def judged(run, **versions):
    """Write the judges of a record, the first of them the one whose verdicts the rates are."""
    first, *others = versions
    kappa = {"kappa": 0.5, "low": 0.1, "high": 0.9, "n": 9}
    told = {first: {"version": versions[first]}}
    for name in others:
        agreement = {"harmful": kappa, "harmless": kappa, "unparsable": 0}
        told[name] = {"version": versions[name], "harmful_score": run.read("metrics.json")["harmful_score"]} | {
            "agreement": agreement
        }
    run.write("metrics.json", {**run.read("metrics.json"), "judges": told})
    return run


def test_two_versions_of_a_judge_share_no_table(tmp_path):
    judged(record(tmp_path, "none", 0.2, 0, 90), refusal=OLD)
    judged(record(tmp_path, "none", 0.2, 1, 50), refusal=NEW)
    record(tmp_path, "none", 0.2, 2, 10)
    text = markdown(summary(records(runs(tmp_path)), "main"))
    heads = sorted(line.rpartition("judged by ")[2] for line in text.splitlines() if line.startswith("###"))
    assert heads == ["refusal 3be1e32b", "refusal aaaaaaaa", "refusal bbbbbbbb"]


def test_a_failed_run_stands_with_those_it_belongs_to(tmp_path):
    judged(record(tmp_path, "none", 0.2, 0, 90), classifier=NEW)
    record(tmp_path, "weight", 0.2, 0, 10).mark("failed", reason="no room")
    told = [row["judge"] for row in records(runs(tmp_path))]
    assert told == ["classifier bbbbbbbb"] * 2


def test_the_frame_has_the_versions(tmp_path):
    judged(record(tmp_path, "none", 0.2, 0, 90), refusal=NEW, classifier=OLD)
    record(tmp_path, "none", 0.2, 1, 90)
    for run in runs(tmp_path):
        run.write("metrics.json", {**run.read("metrics.json"), "stages": {}})
    frame = load(tmp_path).sort_values("seed").set_index("seed")
    assert list(frame["judge"]) == ["refusal"] * 2
    assert list(frame["judge_version"]) == [NEW, "3be1e32bf591cd0e"]
    assert frame["version_classifier"][0] == OLD


def test_runs_whose_suites_were_judged_by_others_share_no_table(tmp_path):
    for seed, own in enumerate([{}, {"xstest": f"classifier {OLD[:8]}"}, {"xstest": f"classifier {NEW[:8]}"}]):
        run = judged(record(tmp_path, "none", 0.2, seed, 90), refusal=OLD)
        run.write("metrics.json", run.read("metrics.json") | ({"suite_judges": own} if own else {}))
    found = summary(records(runs(tmp_path)))
    assert list(found["seeds"]) == [1, 1, 1]
    assert "judged by refusal aaaaaaaa; xstest: classifier bbbbbbbb" in markdown(found)


def test_correlations_mix_no_versions():
    source = np.random.default_rng(0)
    frame = pd.DataFrame(
        {"broken": False, "harmful_score": source.random(12), "drift_harmful_weight": source.random(12)}
    )
    plain = correlations(frame.assign(judge="refusal", judge_version=OLD))
    assert list(plain["measurement"]) == ["weight"]
    found = correlations(frame.assign(judge="refusal", judge_version=[OLD] * 6 + [NEW] * 6))
    assert sorted(found["measurement"]) == [f"weight, judged by refusal {each[:8]}" for each in (OLD, NEW)]
    assert list(found["n"]) == [6, 6]


TODAY = JUDGES["refusal"]().version


@pytest.mark.parametrize(
    ("given", "asked", "line"),
    [
        ({"refusal": TODAY}, ["refusal"], None),
        ({"refusal": OLD}, ["refusal"], f"judged by refusal (refusal aaaaaaaa, today {TODAY[:8]}): "),
        ({"classifier": OLD, "refusal": TODAY}, ["refusal"], "judged by classifier and refusal: "),
        (
            {"refusal": TODAY, "classifier": OLD},
            ["refusal", "classifier"],
            "judged by refusal and classifier (classifier aaaaaaaa, today ",
        ),
        ({"refusal": TODAY}, ["refusal", "endpoint"], "judged by refusal: "),
    ],
)
def test_a_finished_run_of_another_version_says_how_it_is_judged_again(given, asked, line, tmp_path):
    said = []
    endpoint = EndpointConfig("http://localhost:1/v1", "m", max_tokens=99)
    run = SimpleNamespace(evaluation=SimpleNamespace(judges=asked, endpoint=endpoint), cache_root=tmp_path)
    metrics = {"judges": {name: {"version": version} for name, version in given.items()}}
    afterwards._judges(run, SimpleNamespace(path="RUN"), metrics, said.append)
    if line is None:
        assert said == []
    else:
        (text,) = said
        assert text.startswith(line)
        given = """ "endpoint.url='http://localhost:1/v1'" endpoint.model=m endpoint.max_tokens=99"""
        told = given if "endpoint" in asked else ""
        assert text.endswith(f"python -m cwac_lab.evaluate run=RUN judges=[{','.join(asked)}]{told}")
