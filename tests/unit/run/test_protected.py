"""Few reference prompts leave directions free whatever the energy, and that is told."""

from __future__ import annotations

import re

import pytest

from cwac_lab import train
from cwac_lab.config.run import read
from cwac_lab.defenses.cwac.subspace import basis
from cwac_lab.defenses.cwac.subspace.parts import parts_of
from cwac_lab.run import estimate
from cwac_lab.run.protected import surely_free
from support import tiny

WIDTH = 48  # of the tiny model's FFN outputs
FEW, MANY = ([[1, 2, *range(n, n + 5), 3] for n in range(10, 10 + 7 * count, 7)] for count in (5, 40))


@pytest.mark.parametrize(("opening", "prompts"), [("held", FEW), ("counted", FEW), ("held", MANY)])
def test_directions_that_are_free_at_any_energy_are_counted(opening, prompts):
    run = read(tiny.config("constraint=weight", f"constraint.weight.opening={opening}", "constraint.weight.energy=1"))
    spec, parts = run.constraint.requirements.subspace, parts_of(prompts)
    subspace = basis.subspace_of(basis.leading(tiny.model(), prompts, spec, 0, parts=parts))
    rank = max(span.rank for span in subspace.spans.values() if span.width == WIDTH)
    line = surely_free(prompts, parts, spec, subspace)
    if prompts is MANY:
        assert (line, rank) == ("", WIDTH)
        return
    tokens = 2 + 5 * 6  # the opening once
    assert rank <= tokens  # those of the same place and word are alike
    assert f"have {tokens} tokens, the widest layer {WIDTH} inputs: {WIDTH - tokens} directions of it are free" in line


def test_a_dry_run_tells_of_few_tokens_before_weights_are_loaded(tiny_folder, tmp_path, capsys, monkeypatch):
    given = [*tiny.small_run(tiny_folder, tmp_path), "dry=true"]
    tiny.launch(train.main, [*given, "constraint=weight"])
    assert "the reference prompts have" not in capsys.readouterr().out
    monkeypatch.setattr(estimate, "skeleton", lambda _: tiny.model(intermediate_size=10_000))
    for constraint, few in (("weight", True), ("none", False)):
        tiny.launch(train.main, [*given, f"constraint={constraint}"])
        told = " ".join(capsys.readouterr().out.split())
        found = re.search(r"have (\d+) tokens, the widest layer 10000 inputs: (\d+) directions", told)
        assert (found is not None) == few
        assert found is None or int(found[1]) + int(found[2]) == 10_000
