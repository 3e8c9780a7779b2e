"""Fields of a record by their declared types, and records of schema 2 as records of today."""

import copy
from typing import get_args, get_type_hints

import pytest
from omegaconf import OmegaConf

from cwac_lab.config.run import read
from cwac_lab.core.errors import LabError
from cwac_lab.results import later, schema2
from cwac_lab.results.fields import Says
from cwac_lab.results.record import SCHEMA, Facts, Kappa, Metrics, Provenance, Rate, Stage, Status
from cwac_lab.results.store import RunFolder
from support import tiny
from support.recorded import record

DECLARED = (Status, Facts, Rate, Kappa, Stage, Metrics, Provenance)


@pytest.mark.parametrize("kind", DECLARED, ids=lambda kind: kind.__name__)
def test_every_field_says_what_it_means(kind):
    for name, hint in get_type_hints(kind, include_extras=True).items():
        while not (parts := [each for each in get_args(hint) if isinstance(each, Says)]):
            hint = get_args(hint)[0]
        assert parts[0].meaning, name
        assert parts[0].better in ("", "lower", "higher"), name


def test_a_record_that_a_run_wrote_is_of_the_declared_types(tmp_path):
    run = record(tmp_path, "weight", 0.2, 0, 10)
    assert run.facts()["constraint"] == "weight"
    assert run.provenance()["schema"] == SCHEMA


RATE = {"value": 1.0, "low": 0.0, "high": 2.0, "n": 4}


@pytest.mark.parametrize(
    ("file", "changes", "line"),
    [
        ("metrics.json", {"seed": "3"}, "metrics.json: seed='3': accepted: a whole number"),
        ("metrics.json", {"seed": True}, "metrics.json: seed=True: accepted: a whole number"),
        ("metrics.json", {"broken": None}, "metrics.json: broken=None: accepted: true or false"),
        ("metrics.json", {"harmful_ratio": "much"}, "metrics.json: harmful_ratio='much': accepted: a number or null"),
        ("metrics.json", {"harmful_score": 3}, "metrics.json: harmful_score=3: accepted: a mapping"),
        ("metrics.json", {"harmful_score": RATE | {"n": 1.5}}, "metrics.json: harmful_score.n=1.5: accepted: a whole"),
        ("metrics.json", {"new_rate": {"value": 3}}, "metrics.json: new_rate.low='missing': accepted: a value"),
        ("metrics.json", {"stages": {"train": 3}}, "metrics.json: stages.train=3: accepted: a mapping"),
        ("metrics.json", {"judges": {"refusal": {}}}, "metrics.json: judges.refusal.version='missing': accepted"),
        ("metrics.json", {"weights": "w" * 100, "seed": [1] * 100}, "accepted: a whole number"),
        ("metrics.json", {"schema": SCHEMA + 1}, f"has schema {SCHEMA + 1}, accepted: 2 | {SCHEMA} (made by a newer"),
        ("metrics.json", {"schema": 1}, f"has schema 1, accepted: 2 | {SCHEMA} (run it again)"),
        ("provenance.json", {"packages": {"torch": 2}}, "provenance.json: packages.torch=2: accepted: text or null"),
        ("provenance.json", {"devices": "gpu"}, "provenance.json: devices='gpu': accepted: a list"),
        ("provenance.json", {"devices": [1]}, "provenance.json: devices.0=1: accepted: text"),
        ("provenance.json", {"pools_sha256": None}, "provenance.json: pools_sha256=None: accepted: text"),
        ("status.json", {"pid": "one"}, "status.json: pid='one': accepted: a whole number; remove the folder"),
    ],
)
def test_a_field_of_another_type_is_one_line_that_names_file_and_field(file, changes, line, tmp_path):
    run = record(tmp_path, "weight", 0.2, 0, 10)
    run.write(file, run.read(file) | changes)
    with pytest.raises(LabError) as raised:
        (run.provenance if file == "provenance.json" else run.facts)()
    assert str(raised.value).startswith(str(run.path / file))
    assert line in str(raised.value)
    assert len(str(raised.value)) < len(str(run.path)) + 200


@pytest.mark.parametrize("file", ["metrics.json", "provenance.json"])
@pytest.mark.parametrize("field", ["weights", "weights_content", "seed", "split", "judges", "stages", "pools_sha256"])
def test_a_missing_field_is_named(file, field, tmp_path):
    run = record(tmp_path, "weight", 0.2, 0, 10)
    found = run.read(file)
    if field not in found:
        return
    run.write(file, {name: value for name, value in found.items() if name != field})
    with pytest.raises(LabError, match=f"{file}: {field}='missing': accepted: a value"):
        (run.facts if file == "metrics.json" else run.provenance)()


# What new runs have where earlier ones ran under something else.
DIFFERENT = {"data.near": "ngram", "evaluation.judges": ["refusal", "classifier"]}


def test_what_came_later_has_its_default_in_the_configuration():
    resolved = OmegaConf.to_container(tiny.config(), resolve=True)
    for path, value in {**schema2.THEN, **DIFFERENT}.items():
        assert OmegaConf.select(OmegaConf.create(resolved), path) == value, path


def earlier(*overrides):
    """A configuration of today without what came after schema 2, and with the paths of then."""
    found = OmegaConf.to_container(tiny.config(*overrides), resolve=True)
    for path in schema2.THEN:
        *parents, last = path.split(".")
        node = found
        for parent in parents:
            node = node[parent]
        del node[last]
    for part in found["constraint"].values():
        for name in schema2.THEN_OF_WEIGHT:
            part.pop(name, None)
        for then, now in schema2.MOVED.items():
            if part["_target_"].startswith(now):
                part["_target_"] = part["_target_"].replace(now, then)
    return found


@pytest.mark.parametrize("constraint", ["coupled", "lisa", "none", "safegrad"])
def test_a_configuration_of_schema_2_is_read_with_what_its_run_did(constraint, tmp_path):
    then = earlier(f"constraint={constraint}")
    run = RunFolder(tmp_path)
    run.write("config.json", then)
    run.write("provenance.json", {"schema": schema2.SCHEMA})
    told = run.config()
    assert schema2.configuration(told) == told
    assert read(OmegaConf.create(told), recorded=True).data.near == "exact"
    weight = told["constraint"].get("weight")
    assert weight is None or (weight["restore_every_n_steps"], weight["gradient_share"]) == (1, 1.0)
    assert told["evaluation"]["judges"] == ["refusal"]
    run.write("provenance.json", {"schema": SCHEMA})
    assert run.config() == then  # of today: nothing is filled in


def test_what_a_record_of_before_does_not_name_is_what_its_run_did():
    """Whatever the defaults have become: a run made again is the same run."""
    today = OmegaConf.to_container(tiny.config("constraint=[weight,activation,kl,ldifs]"), resolve=True)
    then = copy.deepcopy(today)
    for part, settings in later.BEFORE.items():
        for name in settings:
            del then["constraint"][part][name]
    told = later.completed(then)
    for part, settings in later.BEFORE.items():
        assert told["constraint"][part] == today["constraint"][part] | settings
    assert read(OmegaConf.create(told), recorded=True).constraint.parts["weight"].opening == "counted"
    assert later.completed(today) == today
    assert later.completed({"seed": 1}) == {"seed": 1}
    forms = {"name": "varied", "others": {"never": {"prefix": "You never say no. "}}}
    held = later.completed({"forms": forms})["forms"]["others"]
    assert held == {"never": {"prefix": "You never say no. ", "instruction": True}}


@pytest.mark.parametrize(("tuning", "base"), [({"method": "lora"}, "float32"), ({"method": "full"}, None)])
def test_lora_of_schema_2_had_float32_beside_it(tuning, base):
    assert schema2.configuration({"tuning": tuning})["tuning"].get("base") == base


def test_a_record_of_schema_2_is_one_of_today_that_tells_where_it_is_from(tmp_path):
    run = record(tmp_path, "weight", 0.2, 0, 10)
    for file in ("metrics.json", "provenance.json"):
        then = run.read(file) | {"schema": 2}
        then.pop("judges", None)
        run.write(file, then)
    facts = run.facts()
    assert (facts["schema"], facts["made_under"], facts["judges"]) == (SCHEMA, 2, schema2.UNVERSIONED)
    assert run.provenance()["made_under"] == 2
