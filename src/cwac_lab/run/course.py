"""The course of a run's refusals: what is asked while its model is trained, how it is judged, and where it is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.nn.utils import parametrize

from cwac_lab.config.run import Run
from cwac_lab.core.errors import ConfigError
from cwac_lab.core.progress import duration
from cwac_lab.diagnostics.callback import Sample, Sampler
from cwac_lab.diagnostics.divergence import Divergence
from cwac_lab.diagnostics.probe import evaluating
from cwac_lab.evaluation.course import half_lost, sample
from cwac_lab.evaluation.growth import growth
from cwac_lab.evaluation.protocol import answered, prompt_of
from cwac_lab.evaluation.verdicts import START_OUTPUT, judge_rows
from cwac_lab.judges.refusal import RefusalJudge
from cwac_lab.models.chat import ChatFormat
from cwac_lab.results import store
from cwac_lab.results.store import RunFolder
from cwac_lab.training.checkpoint import resumed
from cwac_lab.training.rates import training_time

KEY = "evaluation.every_n_steps"


class Course:
    """Asks a model the first harmful prompts of a run's evaluation, and compares it with its start.

    The judge is ``refusal`` whoever judges the run: a judge behind a server could fail in the middle of training.
    """

    def __init__(self, run: Run, rows: list[dict[str, Any]], start: Any, chat: ChatFormat) -> None:
        """Run the start on its own answers.

        Args:
            run: The run.
            rows: Its harmful prompts with the start's answers (``START_OUTPUT``).
            start: The start model.
            chat: Its chat format.
        """
        self._run = replace(run, evaluation=replace(run.evaluation, engine="hf"))
        self._chat, self._judge = chat, RefusalJudge()
        self._rows = rows[: run.evaluation.watched]
        asking = chat.with_template(run.attack.template)
        begun = [asking.encode_own(prompt_of(row), row[START_OUTPUT], ended=True) for row in self._rows]
        self._divergence = Divergence(start, begun, chat.pad_id)

    @property
    def facts(self) -> dict[str, Any]:
        """What is asked, how it is judged, and what the start refuses of it."""
        begun = judge_rows([{**row, "output": row[START_OUTPUT]} for row in self._rows], self._run.task, self._judge)
        said = sample(begun)
        return {
            "prompts": len(self._rows),
            "judge": f"{self._judge.name} {self._judge.version[:8]}",
            "start_refused": [bool(verdict["start_refused"]) for verdict in begun],
            "start": {rate: said[rate] for rate in ("harmful_score", "retained_refusals", "incoherent")},
        }

    def __call__(self, model: Any) -> Sample:
        """Return a sample of a model (``evaluation.course.sample``).

        It also has the divergence from the start at its first tokens: ``kl`` over all of them, and ``kl_by_prompt``.
        """
        with parametrize.cached(), evaluating(model), torch.no_grad():
            given = answered(self._run, {"harmful": self._rows}, model, self._chat)
        found = sample(judge_rows(given, self._run.task, self._judge))
        apart = self._divergence.by_answer(model)
        return {**found, "kl": float(torch.cat(apart).mean()), "kl_by_prompt": [float(each.mean()) for each in apart]}


def check_steps(run: Run, steps: int) -> None:
    """Check that a run has a step to look at before its last.

    Raises:
        ConfigError: If not.
    """
    if (every := run.evaluation.every_n_steps) >= steps:
        raise ConfigError(KEY, every, f"0, or less than the {steps} steps of this run")


def sampler(course: Course, run: Run, folder: RunFolder, steps: int) -> Sampler:
    """Return what follows the course of a run; one that is resumed goes on with the samples that there are.

    Raises:
        ConfigError: If a run has no step to look at before its last, or began with another number of prompts.
    """
    check_steps(run, steps)
    facts = course.facts
    goes_on = resumed(folder.path / store.CHECKPOINT) and folder.has(store.COURSE)
    earlier = folder.read(store.COURSE)["samples"] if goes_on else []
    began = {len(each["refused"]) for each in earlier} - {len(facts["start_refused"])}
    if began:
        accepted = f"{began.pop()}, with which this run began, or force=true"
        raise ConfigError("evaluation.watched", run.evaluation.watched, accepted)
    time = training_time(run.trainer, steps)
    # A base in fewer bits is apart from the start before anything is trained, and one in 16 moves in jumps.
    rounded = run.tuning.dtype is not None or run.dtype != torch.float32

    def record(samples: list[Sample]) -> None:
        lost, grown = half_lost(samples, facts["start_refused"]), None if rounded else growth(samples, time)
        folder.write(store.COURSE, {**facts, "half_lost": lost, "growth": grown, "samples": samples})

    return Sampler("course", course, run.evaluation.every_n_steps, earlier, record)


def told(folder: RunFolder, say: Callable[[str], None]) -> dict[str, Any]:
    """Return what a record has of the course, and tell it."""
    found = folder.read(store.COURSE)
    lost, grown = found["half_lost"], found["growth"]
    if lost is None:
        say("course: the start refuses none of the prompts that are watched")
    else:
        half = f"after {lost['value']:.0f} steps" if lost["value"] is not None else f"not within {lost['steps']} steps"
        say(f"half of the start's refusals are lost {half} (n={lost['n']})")
    spent = sum(each.get("seconds", 0) for each in found["samples"])
    say(f"watching refusals during training took {duration(spent)}")
    if grown is not None:
        power = "{value:.1f} [{low:.1f}, {high:.1f}] (n={n}, {samples} samples)".format(**grown)
        where = "steps {} to {}: {:.1f} in the first half of these samples, {:.1f} in the second"
        say(f"the divergence from the start grows with training time to the power {power}")
        say(where.format(*grown["steps"], *grown["halves"]))
    return {name: each for name, each in (("half_lost", lost), ("growth", grown)) if each is not None}
