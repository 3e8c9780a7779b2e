"""Tasks of EleutherAI's lm-evaluation-harness, asked of a model in memory; each metric as the harness has it.

The harness brings the tasks, their prompts, few-shot examples and scores. Models are asked through their chat template.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cwac_lab.core.errors import ConfigError, LabError, MissingAsset
from cwac_lab.evaluation.settings import EvaluationConfig
from cwac_lab.models.chat import ChatFormat

KEY = "evaluation.lm_eval"
# Rows of a forward at most: scores of given answers take the logits of whole prompts.
_AT_ONCE = 8
# Resamples for the few metrics whose standard error has no formula.
_RESAMPLES = 1000
_NORMAL = 1.96
# Metrics that are the share of documents that a model gets right; others are taken as they are (tasks differ in the
# scale of F1).
_SHARES = ("acc", "acc_norm", "exact_match", "em")
_PERCENT = "%"


def check(config: EvaluationConfig, devices: int) -> None:
    """Check that the tasks that are asked for can be asked here; nothing is fetched.

    Raises:
        ConfigError: If the harness is not installed, does not know a task, or the run has several processes.
        MissingAsset: If the folder of tasks is not there.
    """
    if not config.lm_eval:
        return
    if find_spec("lm_eval") is None:
        installed = "[], or tasks where the harness is installed: pip install 'cwac-lab[lm-eval]'"
        raise ConfigError(KEY, _listed(config.lm_eval), installed)
    if devices > 1:
        raise ConfigError(KEY, _listed(config.lm_eval), f"[] with trainer.devices={devices}; ask the finished run then")
    if config.lm_eval_tasks is not None and not Path(config.lm_eval_tasks).is_dir():
        raise MissingAsset(f"evaluation.lm_eval_tasks={config.lm_eval_tasks}: no such folder")
    known = set(_manager(config.lm_eval_tasks).all_tasks)
    unknown = [task for task in config.lm_eval if task not in known]
    if unknown:
        own = "" if config.lm_eval_tasks is None else f", or of {config.lm_eval_tasks}"
        raise ConfigError(KEY, unknown[0], f"a task of lm_eval {version('lm_eval')}{own}: lm-eval ls tasks lists them")


def _listed(tasks: list[str]) -> str:
    return f"[{','.join(tasks)}]"


@cache  # to read the folders of all tasks takes seconds
def _manager(folder: str | None) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder)


def lacks(config: EvaluationConfig, record: dict[str, Any]) -> bool:
    """Tell whether a record has not all tasks that are asked for, on as many documents."""
    told = record.get("lm_eval") or {"asked": [], "limit": config.lm_eval_limit}
    return bool(config.lm_eval) and (
        not set(config.lm_eval) <= set(told["asked"]) or told["limit"] != config.lm_eval_limit
    )


def measured(
    config: EvaluationConfig, model: Any, chat: ChatFormat, known: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Return what the harness measures, as a record has it (``results.record.Harness``).

    Args:
        config: The tasks, and how many documents of each.
        model: A causal language model in evaluation mode.
        chat: Its chat format, of which the tokenizer with its template counts.
        known: What the record has of the same model. Its tasks are kept; of another version of the harness, or with
            another limit, they are asked again where they are known here.

    Raises:
        LabError: If the harness cannot load a task's data or fails on it.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    stated = {"version": version("lm_eval"), "limit": config.lm_eval_limit}
    before = known or {"asked": [], "tasks": {}, **stated}
    same = all(before[name] == value for name, value in stated.items())
    asked_for = list(dict.fromkeys([*before["asked"], *config.lm_eval]))
    here = set(_manager(config.lm_eval_tasks).all_tasks)  # an earlier own task may be in a folder that is not given
    asked_for = [task for task in asked_for if same or task in here or task in config.lm_eval]
    tasks = [task for task in asked_for if not same or task not in before["asked"]]
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what is meant here
    own = model.generation_config
    try:
        asked = HFLM(pretrained=model, tokenizer=copy.deepcopy(chat.tokenizer), batch_size=_AT_ONCE)
        found = simple_evaluate(
            model=asked, tasks=tasks, task_manager=_manager(config.lm_eval_tasks),
            limit=config.lm_eval_limit, apply_chat_template=True, bootstrap_iters=_RESAMPLES, log_samples=False,
        )  # fmt: skip
    except Exception as error:  # tasks are code of others, and raise what they raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise LabError(f"{KEY}={_listed(tasks)}: lm_eval failed ({reason[:300]})") from error
    finally:
        model.generation_config = own
    assert found is not None
    new = {task: metrics for task in _whole(found) if (metrics := _metrics(found, task))}
    return {**stated, "asked": asked_for, "tasks": (before["tasks"] if same else {}) | new}


def _whole(found: dict[str, Any]) -> Iterator[str]:
    """Yield the tasks that are no part of another one, in order; of a group without metrics its parts."""
    parts = found.get("group_subtasks", {})
    inner = {name for names in parts.values() for name in names}

    def scored(name: str) -> Iterator[str]:
        if _stated(found["results"].get(name, {})):
            yield name
        else:
            for part in parts.get(name, ()):
                yield from scored(part)

    for name in dict.fromkeys((*parts, *found["results"])):
        if name not in inner:
            yield from scored(name)


def _stated(result: dict[str, Any]) -> list[str]:
    """Return the metrics of a task as the harness names them, ``METRIC,FILTER``."""
    names = (name for name, value in result.items() if "," in name and isinstance(value, (int, float)))
    return [name for name in names if not name.partition(",")[0].endswith("_stderr")]


def _documents(found: dict[str, Any], task: str) -> int:
    """Return on how many documents a task or group was measured."""
    told = found["n-samples"].get(task)
    if told is not None:
        return int(told["effective"])
    return sum(_documents(found, part) for part in found["group_subtasks"].get(task, ()))


def _metrics(found: dict[str, Any], task: str) -> dict[str, dict[str, Any]]:
    result, n = found["results"][task], _documents(found, task)
    higher = found["higher_is_better"].get(task, {})
    table = {}
    for stated in _stated(result):
        name, _, kept = stated.partition(",")
        told = result.get(f"{name}_stderr,{kept}")
        error = float(told) if isinstance(told, (int, float)) else None  # a text where there is none
        table[stated] = interval(name, float(result[stated]), error, n, higher.get(name))
    return table


def interval(metric: str, value: float, error: float | None, n: int, higher: bool | None = None) -> dict[str, Any]:
    """Return a metric with its 95 % interval, ``value +- 1.96 error``; a share in percent, its interval within 0..100.

    Args:
        metric: Its name.
        value: What the harness computed.
        error: The standard error of that; None where the harness has none.
        n: Documents.
        higher: Whether more is better; None where the harness does not say.
    """
    share = metric in _SHARES or metric.endswith("_acc")
    scale = 100.0 if share else 1.0
    ends: tuple[float | None, float | None] = (None, None)
    if error is not None:
        low, high = value - _NORMAL * error, value + _NORMAL * error
        ends = (100 * max(0.0, low), 100 * min(1.0, high)) if share else (low, high)
    told = {"value": scale * value, "low": ends[0], "high": ends[1], "n": n}
    better = "" if higher is None else "higher" if higher else "lower"
    return {**told, "unit": _PERCENT if share else "", "better": better}
