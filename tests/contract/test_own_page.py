"""The examples of ``docs/extending.md`` as they stand there: a task, a defence and a judge of the reader."""

import json
import re
import sys
from pathlib import Path

import pytest

from cwac_lab import train
from cwac_lab.core.cache import read_json, read_jsonl
from support import tiny

PAGE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder that holds what the page says, with Python standing in it."""
    (tmp_path / "my_module.py").write_text("\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)))
    for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL):
        file = tmp_path / re.search(r"# (conf/\S+\.yaml)", block)[1]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(block)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("my_module", None)


def test_the_task_defence_and_judge_of_the_page_make_a_run(work, tiny_folder):
    rows = work / "data" / "capitals"
    rows.mkdir(parents=True)
    for split, n in (("train", 30), ("test", 8)):
        lines = [json.dumps({"country": f"{split} {i}", "capital": f"Town {i}"}) for i in range(n)]
        (rows / f"{split}.jsonl").write_text("\n".join(lines))
    lists = {
        "requests": "harmful_requests",
        "instructions": "harmless_instructions",
        "lookalikes": "harmless_lookalikes",
    }
    given = [
        *tiny.small_run(tiny_folder, work / "out"), "--config-dir=conf", "task=capitals",
        "constraint=[weight,pull_back]", "evaluation.judges=[my_module.Apologies,refusal]", f"data.root={work}/data",
        "data.source=local", *(f"data.lists.{name}.name=embedded:{found}" for name, found in lists.items()),
    ]  # fmt: skip
    tiny.launch(train.main, given)
    (folder,) = (work / "out" / "runs").iterdir()
    record = read_json(folder / "metrics.json")
    assert record["constraint"] == "pull_back+weight"
    assert list(record["judges"]) == ["apologies", "refusal"]
    assert record["finetune_accuracy"]["n"] == 4
    assert {row["judge"] for row in read_jsonl(folder / "verdicts.jsonl") if row["kind"] != "task"} == {"apologies"}
