"""What every command tells of a setting that it cannot use, in one line."""

import pytest

from cwac_lab import compare, tables, train
from support import tiny


@pytest.mark.parametrize(
    ("module", "name", "arguments", "line"),
    [
        (tables, "tables", ["output_root=null"], "output_root=None: accepted: a folder"),
        (train, "config", ["cache_root=null"], "cache_root=None: accepted: a folder"),
        (tables, "tables", ["exp=[]"], "exp=[]: accepted: all, or names of experiments"),
        (tables, "tables", ["exp=all", "seeds=abc"], "seeds=abc: accepted: an integer >= 1"),
        (tables, "tables", ["exp=all", "seeds=1.5"], "seeds=1.5: accepted: an integer >= 1"),
        (tables, "tables", ["exp=all", "jobs=true"], "jobs=True: accepted: an integer >= 1"),
        (
            compare, "compare", ["before=a", "after=b", "fail_below.retained_refusals=most"],
            "fail_below.retained_refusals=most: accepted: a number in [0, 100]",
        ),
        (train, "config", ["dry=true", "trainer.export=false", "export.push=me/x"], "export.push=me/x: accepted: null"),
    ],
)  # fmt: skip
def test_a_setting_that_cannot_be_used_is_one_line(module, name, arguments, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert tiny.error_of(module.main, arguments, capsys, name).startswith(line)
    assert not (tmp_path / "None").exists()
