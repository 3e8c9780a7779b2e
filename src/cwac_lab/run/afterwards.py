"""What a finished run is asked for that its record does not have: made from what is there, or told how to get it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from cwac_lab.config.run import Run
from cwac_lab.core import distributed
from cwac_lab.core.errors import LabError
from cwac_lab.core.overrides import typed
from cwac_lab.data.forms import SYSTEM
from cwac_lab.data.suites import Suite
from cwac_lab.evaluation.metrics import METRICS, PROMPT_KINDS
from cwac_lab.judges import ENDPOINT, all_made
from cwac_lab.judges.endpoint import EndpointConfig
from cwac_lab.report.tracking import log_run
from cwac_lab.results import store
from cwac_lab.results.store import RunFolder
from cwac_lab.run import ability
from cwac_lab.run.asked import note
from cwac_lab.run.drift import POOLS, Measurer
from cwac_lab.run.push import push
from cwac_lab.run.stages import write_card
from cwac_lab.run.start import Start
from cwac_lab.run.suite_answers import ask_more
from cwac_lab.training.loop import loggers

Say = Callable[[str], None]


def catch_up(
    run: Run, folder: RunFolder, begin: Start, suites: Mapping[str, Suite], metrics: dict[str, Any], say: Say
) -> None:
    """Make what can be made of what is asked for; a run is not repeated unasked.

    Args:
        run: What is asked for; its key is that of the record.
        folder: The finished run.
        begin: Its start.
        suites: Named suites that are asked for.
        metrics: Its record.
        say: Told what is made, and what is as it was.

    Raises:
        LabError: If something that is asked for is not there and cannot be made, so that nobody goes on without it.
    """
    _judges(run, folder, metrics, say)
    lacking = []
    saved = run.tuning.saved if run.finetune and run.trainer.export else ()
    asked = {store.MODEL: "trainer.export=true", store.ADAPTER: f"tuning.save={run.tuning.save}"}
    lacking += [f"{name}/ ({asked[name]})" for name in saved if not folder.has(name)]
    lacking += _system(run, begin, metrics)
    recorded = folder.config().get("evaluation", {})
    if run.finetune and run.evaluation.words_rates and not recorded.get("words_rates", True):
        lacking.append("rates behind words that rows begin with (evaluation.words_rates=true)")
    every = run.evaluation.every_n_steps
    if run.finetune and every and recorded.get("every_n_steps", 0) != every:
        lacking.append(f"{store.COURSE} of every {every} steps, which is taken while a model is trained")
    lacking += ask_more(run, folder, begin, suites, metrics, say)
    if run.finetune and run.diagnostics.enabled:
        lacking += _drift(run, folder, begin, say)
    if run.evaluation.perplexity or run.evaluation.lm_eval:
        lacking += ability.catch_up(run, folder, begin, say)
    write_card(run, folder, folder.read(store.METRICS))
    _tracked(run, folder, say)
    if lacking:
        raise LabError(f"already done, but {folder.path} has no {' and no '.join(lacking)}: force=true repeats the run")
    note(run.resolved, folder)
    if run.export.push is not None:
        push(run.export, folder.path / saved[0], say)


def _judges(run: Run, folder: RunFolder, metrics: dict[str, Any], say: Say) -> None:
    """Tell how to get rates of other judges, or of today's versions of these, which needs no model."""
    given = {name: told["version"] for name, told in metrics["judges"].items()}
    judges = all_made(run.evaluation.judges, run.evaluation.endpoint, run.cache_root)
    today = {judge.name: judge.version for judge in judges}
    older = [
        f"{name} {version[:8]}, today {today[name][:8]}"
        for name, version in given.items()
        if name in today and version != today[name]
    ]
    if next(iter(given)) != next(iter(today)) or not set(today) <= set(given) or older:
        told = " and ".join(given) + (f" ({'; '.join(older)})" if older else "")
        command = f"python -m cwac_lab.evaluate {typed('run', folder.path)} judges=[{','.join(run.evaluation.judges)}]"
        say(f"judged by {told}: {command}{_endpoint(run)}")


def _endpoint(run: Run) -> str:
    """Return the settings of an endpoint as the command takes them, where it judges; those by default are left out."""
    given, default = asdict(run.evaluation.endpoint), asdict(EndpointConfig())
    if ENDPOINT not in run.evaluation.judges:
        return ""
    keys = {f"endpoint.{name}": value for name, value in given.items() if value != default[name]}
    said = (typed(key, value) if isinstance(value, str) else f"{key}={value}" for key, value in keys.items())
    return "".join(f" {each}" for each in said)


def _system(run: Run, begin: Start, metrics: dict[str, Any]) -> list[str]:
    """Return what of the rates under a system prompt is asked for and not there: no model is asked again unasked."""
    there = any(metric.form == SYSTEM for name, metric in METRICS.items() if name in metrics)
    prompts = any(begin.pools.get(kind, run.evaluation.split) for kind in PROMPT_KINDS)
    if there or not prompts or not run.task.system_rates or run.task.system is None:
        return []
    return ["rates under the system prompt (task.system_rates=true)"]


def _drift(run: Run, folder: RunFolder, begin: Start, say: Say) -> list[str]:
    """Measure a saved model where it was not; returns what of the asked measurements cannot be made."""
    lacking = []
    recorded = folder.config().get("diagnostics", {})
    every = run.diagnostics.every_n_steps
    if every and not (folder.has(store.SAMPLES) and recorded.get("every_n_steps") == every):
        lacking.append(f"{store.SAMPLES} of every {every} steps, which is taken while a model is trained")
    if folder.has(store.DRIFT):
        most = run.diagnostics.n_prompts
        asked = {kind: len(begin.pools.get(pool, run.evaluation.split)[:most]) for kind, pool in POOLS.items()}
        held = folder.read(store.DRIFT)["prompts"]
        if held != asked:
            command = f"python -m cwac_lab.diagnose {typed('run', folder.path)} n_prompts={most}"
            say(f"{store.DRIFT} is of {held['harmful']} harmful and {held['benign']} benign prompts: {command}")
    elif not folder.has(store.MODEL):
        lacking.append(f"{store.DRIFT} (diagnostics.enabled=true) nor a model to measure")
    elif distributed.world() > 1:
        lacking.append(f"{store.DRIFT} (made in one process: python -m cwac_lab.diagnose {typed('run', folder.path)})")
    else:
        say(f"measuring the saved model: {store.DRIFT}")
        Measurer(say).of_run(folder, run.resolved)
    return lacking


def _tracked(run: Run, folder: RunFolder, say: Say) -> None:
    """Tell Weights & Biases of a run that it was not told of."""
    if run.logger.wandb == "off" or folder.has("wandb"):
        return
    with loggers(run.logger, folder.path, folder.path.name, run.resolved) as made:
        log_run(made, folder, say)
    say(f"told to wandb, {run.logger.wandb}: rates and verdicts of the record (its curves are in log/metrics.csv)")
