"""A task of lm-evaluation-harness of 20 rows in a folder, and a stand-in for the harness where it is not installed."""

import importlib.metadata
import importlib.util
import json
import sys
from types import ModuleType

ROWS = [("Is {} more than ten?", n) for n in range(1, 21)]
INSTALLED = importlib.util.find_spec("lm_eval") is not None
WHY_NOT = "lm-evaluation-harness is not installed here: pip install 'cwac-lab[lm-eval]'"
TASK = """\
task: twenty
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["no", "yes"]
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def task_folder(folder):
    """Write the task ``twenty`` and its rows, ten of them answered by yes; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = folder / "rows.jsonl"
    told = [{"question": text.format(n), "answer": int(n > 10)} for text, n in ROWS]
    rows.write_text("".join(json.dumps(row) + "\n" for row in told))
    (folder / "twenty.yaml").write_text(TASK.format(rows=rows))
    return folder


def results(value=0.6, n=20):
    """What ``simple_evaluate`` returns of the task (0.4.13), as far as it is read."""
    error = (value * (1 - value) / (n - 1)) ** 0.5
    return {
        "results": {"twenty": {"alias": "twenty", "sample_len": n, "acc,none": value, "acc_stderr,none": error}},
        "group_subtasks": {},
        "higher_is_better": {"twenty": {"acc": True}},
        "n-samples": {"twenty": {"original": 20, "effective": n}},
    }


def stand_in(monkeypatch, found=None):
    """Let ``lm_eval`` be a module that knows ``twenty`` and the folder's tasks; returns the calls it gets.

    Args:
        monkeypatch: The fixture.
        found: What it returns, or an error that it raises; by default results on as many rows as are asked for.
    """
    from cwac_lab.evaluation import harness

    calls = []

    class TaskManager:
        def __init__(self, include_path=None):
            self.all_tasks = ["gsm8k", "ifeval", *(["twenty"] if include_path else [])]

    class HFLM:
        def __init__(self, pretrained, tokenizer, batch_size):
            self.model = pretrained

    def simple_evaluate(**asked):
        calls.append(asked)
        if isinstance(found, Exception):
            raise found
        return found or results(n=asked["limit"] or 20)

    modules = {name: ModuleType(name) for name in ("lm_eval", "lm_eval.tasks", "lm_eval.models.huggingface")}
    modules["lm_eval"].simple_evaluate = simple_evaluate
    modules["lm_eval.tasks"].TaskManager = TaskManager
    modules["lm_eval.models.huggingface"].HFLM = HFLM
    for name, module in {**modules, "lm_eval.models": ModuleType("lm_eval.models")}.items():
        monkeypatch.setitem(sys.modules, name, module)
    version = importlib.metadata.version
    monkeypatch.setattr(harness, "version", lambda name: "0.4.13" if name == "lm_eval" else version(name))
    monkeypatch.setattr(harness, "find_spec", lambda name: modules.get(name))
    monkeypatch.setattr(harness, "_manager", lambda folder: TaskManager(folder))
    return calls
