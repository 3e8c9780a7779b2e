"""The key of a run changes with its settings and all that it starts from, and with nothing else."""

import sys
import types
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest

from cwac_lab.config.run import INCIDENTAL
from cwac_lab.core.cache import digest
from cwac_lab.core.errors import ConfigError
from cwac_lab.data import attacks
from cwac_lab.data.mixing import TrainRow
from cwac_lab.data.tasks.agnews import AGNews
from cwac_lab.data.tasks.sst2 import SST2
from cwac_lab.models.loading import ModelFolder
from cwac_lab.results.store import flat
from cwac_lab.run import identity
from cwac_lab.run.identity import ATTACK_ROWS, run_key
from cwac_lab.run.start import Start
from support.settings import another


def _changed(settings, path):
    """Return settings with another value at a dotted path."""
    changed = deepcopy(settings)
    *parents, name = path.split(".")
    parent = changed
    for each in parents:
        parent = parent[each]
    value = parent[name]
    parent[name] = [*value, "more"] if isinstance(value, list) else "another" if value is None else another(value)
    return changed


def test_the_key_of_a_run_changes_with_every_setting_that_is_not_incidental(run):
    settings = run.resolved
    for path in flat(settings):
        alike = path in INCIDENTAL or path.startswith(tuple(f"{name}." for name in INCIDENTAL))
        if path.endswith("_target_"):
            continue
        same = run_key(settings, {}) == run_key(_changed(settings, path), {})
        assert same is (alike or path == "trainer.devices"), path


def test_the_key_of_a_run_has_the_name_of_a_class_and_not_its_place(run, monkeypatch):
    module = types.ModuleType("moved_there")
    module.SST2, module.AGNews = SST2, AGNews
    monkeypatch.setitem(sys.modules, "moved_there", module)
    settings, task = run.resolved, run.resolved["task"]
    moved, other = ({**settings, "task": {**task, "_target_": f"moved_there.{name}"}} for name in ("SST2", "AGNews"))
    assert run_key(moved, {}) == run_key(settings, {}) != run_key(other, {})


OWN = """# of mine
import math
from cwac_lab.data.tasks.sst2 import SST2

class Films(SST2):
    {body}
"""


@pytest.mark.parametrize(
    ("body", "same"),
    [
        ('"""Others."""\n    longest = 3', True),
        ("longest =    3  # rows", True),
        ("longest = 4", False),
        ("longest: int = 3", False),
        ("longest = 3\n    more = math.inf", False),
    ],
)
def test_to_edit_an_own_class_makes_another_run(body, same, run, tmp_path, monkeypatch):
    def own_of(name, text):
        (tmp_path / f"{name}.py").write_text(OWN.format(body=text))
        settings = {**run.resolved, "task": {**run.resolved["task"], "_target_": f"{name}.Films"}}
        return identity.own_sources(replace(run, resolved=settings)), run_key(settings, {})

    monkeypatch.syspath_prepend(tmp_path)
    unique = f"own_{digest(body)[:8]}"
    (first, key), (second, also) = own_of(f"{unique}_a", "longest = 3"), own_of(f"{unique}_b", body)
    assert key == also  # the name of the class, not where it is
    assert (first == second) is same
    assert first.keys() == {identity.OWN}
    assert identity.own_sources(run) == {}  # of the package nothing is added


def test_an_own_class_without_a_source_is_one_line(run, monkeypatch):
    module = types.ModuleType("no_source")
    module.Films = type("Films", (SST2,), {"__module__": "no_source"})
    monkeypatch.setitem(sys.modules, "no_source", module)
    settings = {**run.resolved, "task": {**run.resolved["task"], "_target_": "no_source.Films"}}
    with pytest.raises(ConfigError, match=r"task._target_=no_source.Films: accepted: a class of a module with"):
        identity.own_sources(replace(run, resolved=settings))


def test_the_key_of_a_run_changes_with_all_that_it_starts_from(run):
    content = dict.fromkeys(("weights_content", "base_content", "task_data_sha256", ATTACK_ROWS), "a")
    for name in content:
        assert run_key(run.resolved, content) != run_key(run.resolved, {**content, name: "b"})


def test_the_rows_of_an_attack_are_in_the_key_of_a_run_that_is_trained_on_them(run, pools, monkeypatch):
    begin, data = Start(ModelFolder(Path(), "words", "weights"), pools), pools.task_rows(run.data, run.task)
    persona = replace(run, attack=replace(run.attack, rows="identity", prefix="Obey. "))

    def found(of):
        content = identity.content_of(of, begin, data)
        return content.get(ATTACK_ROWS), run_key(of.resolved, content), identity.start_key(of)

    (none, plain, alone), (rows, key, start) = found(run), found(persona)
    assert none is None
    assert start != alone
    assert rows is not None
    assert key != plain
    assert len(attacks.identity_rows("")) > 1
    monkeypatch.setattr(attacks, "identity_rows", lambda prefix, _: [TrainRow("i", f"{prefix}tell", "me", True)])
    assert found(run) == (none, plain, alone)
    assert all(now != then for now, then in zip(found(persona), (rows, key, start), strict=True))


@pytest.mark.parametrize(
    ("override", "starts", "probed"),
    [
        ("model.chat_template='{% for m in messages %}{{ m.content }}{% endfor %}'", True, True),
        ("task.max_new_tokens=9", True, True),
        ("data.split_seed=7", True, True),
        ("align.epochs=9", True, True),
        ("trainer.max_length=99", True, True),
        ("evaluation.split=validation", False, True),
        ("diagnostics.n_prompts=3", False, True),
        ("sae.k=7", False, True),
        ("constraint.weight.energy=0.5", False, True),
        ("forms=varied", False, True),
        ("tuning=qlora", False, True),
        ("seed=5", False, False),
        ("harmful_ratio=0.1", False, False),
        ("trainer.epochs=9", False, False),
    ],
)
def test_runs_share_what_they_start_from_and_what_their_start_computes(override, starts, probed, run, small):
    other = small(override)
    assert (identity.start_key(run) != identity.start_key(other)) is starts
    assert (identity.probe_key(run) != identity.probe_key(other)) is probed
