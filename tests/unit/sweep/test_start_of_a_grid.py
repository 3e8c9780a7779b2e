"""Which settings of a grid's cells its start shares."""

import pytest

from cwac_lab.sweep.grid import Grid


@pytest.mark.parametrize(
    ("cell", "kept"),
    [
        (("attack=pure", "task=sst2"), ("task=sst2",)),  # an attack on training alone
        (("attack=of_a_user",), ("attack=of_a_user",)),
        (("+data.lists.mine={name: s.jsonl}", "data.harmful.test.mine=4"), None),
        (("suite=xstest", "suites.xstest.n=5", "++suites.xstest.judge=classifier", "trainer.epochs=2"), slice(3)),
        (("evaluation.suites=[xstest]", "~data.lists.mine", "+constraint.weight.x=1"), slice(2)),
    ],
)
def test_a_start_is_asked_what_its_cells_are(cell, kept):
    expected = kept if isinstance(kept, tuple) else cell[kept] if kept else cell
    first, *_ = Grid("g", "g", (cell,), start=True).runs(1)
    assert first == (*expected, "finetune=false")
