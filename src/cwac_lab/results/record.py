"""What the record of a run holds: its files, and every field of them with its meaning, unit and direction."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NotRequired, Protocol, TypedDict

from cwac_lab.core.errors import LabError
from cwac_lab.results import schema2
from cwac_lab.results.fields import Misfit, Says, check

STATUS, METRICS, GENERATIONS, VERDICTS = "status.json", "metrics.json", "generations.jsonl", "verdicts.jsonl"
CONFIG, PROVENANCE, MANIFEST = "config.json", "provenance.json", "manifest.json"
DRIFT, SAMPLES, COURSE = "drift.json", "drift_samples.json", "course.json"
# Raised when fields change their meaning. Records of ``schema2`` are read, and no new run is taken for one of them.
SCHEMA = 3
# What ran, told in METRICS of a finished run and, from its beginning, in PROVENANCE.
FACTS = ("weights", "weights_content", "model", "task", "data", "constraint", "harmful_ratio", "seed", "split")


class Status(TypedDict):
    """``status.json``: what became of a run."""

    status: Annotated[str, Says("ok, failed, running or interrupted")]
    reason: NotRequired[Annotated[str, Says("why it failed: the error in one line")]]
    host: NotRequired[Annotated[str, Says("the machine that was on it last")]]
    pid: NotRequired[Annotated[int, Says("the process that was on it last")]]
    heartbeat: NotRequired[Annotated[str, Says("when that process last wrote this file", "ISO 8601, UTC")]]


class Facts(TypedDict):
    """What ran."""

    schema: Annotated[int, Says("version of the meaning of these fields")]
    made_under: NotRequired[Annotated[int, Says("an earlier version that the record was written under")]]
    weights: Annotated[str, Says("the start weights in words")]
    weights_content: Annotated[str, Says("hash of the files of the start weights", "SHA-256")]
    model: Annotated[str, Says("name of the model's option")]
    task: Annotated[str, Says("name of the task that is fine-tuned on")]
    data: Annotated[str, Says("where rows come from: embedded, local or hub")]
    constraint: Annotated[str, Says("name of the defence; start where nothing is fine-tuned, none without one")]
    harmful_ratio: Annotated[float | None, Says("share of harmful rows in the mixture; null for a start", "of 1")]
    seed: Annotated[int, Says("draws the mixture, the order of batches and the factors of LoRA")]
    split: Annotated[str, Says("what is evaluated on: validation or test")]


class Rate(TypedDict):
    """A share of answers with its 95 % Wilson interval; meaning, direction, form: ``evaluation.metrics.METRICS``."""

    value: Annotated[float | None, Says("the share; null where no answer counts", "%")]
    low: Annotated[float | None, Says("lower end of the interval", "%")]
    high: Annotated[float | None, Says("upper end of the interval", "%")]
    n: Annotated[int, Says("answers that count")]


class Loss(TypedDict):
    """The mean loss on held-out answers with its 95 % interval over rows."""

    value: Annotated[float | None, Says("cross-entropy", "nats per token", "lower")]
    low: Annotated[float | None, Says("lower end of the interval", "nats per token")]
    high: Annotated[float | None, Says("upper end of the interval", "nats per token")]
    n: Annotated[int, Says("answers")]


class Perplexity(TypedDict):
    """Perplexity on plain text with its 95 % interval over documents."""

    value: Annotated[float | None, Says("exp of the loss per token; null where it is no number", better="lower")]
    low: Annotated[float | None, Says("lower end of the interval")]
    high: Annotated[float | None, Says("upper end of the interval")]
    n: Annotated[int, Says("documents")]


class Forgetting(TypedDict):
    """How much more loss per token than its start a model has, with the 95 % interval of paired documents."""

    value: Annotated[float | None, Says("rise of the cross-entropy", "nats per token", "lower")]
    low: Annotated[float | None, Says("lower end of the interval", "nats per token")]
    high: Annotated[float | None, Says("upper end of the interval", "nats per token")]
    n: Annotated[int, Says("documents")]


class TaskMetric(TypedDict):
    """One metric of a task of lm-evaluation-harness with its 95 % interval, ``value +- 1.96`` standard errors."""

    value: Annotated[float, Says("the metric")]
    low: Annotated[float | None, Says("lower end of the interval; null where the harness has no standard error")]
    high: Annotated[float | None, Says("upper end of the interval")]
    n: Annotated[int, Says("documents")]
    unit: Annotated[str, Says("% for a share of documents; empty for a metric as the harness has it")]
    better: Annotated[str, Says("lower or higher; empty where the harness does not say")]


class WinRate(TypedDict):
    """How often answers to the task's rows are preferred to another run's (``evaluation.pairwise``)."""

    value: Annotated[float | None, Says("wins and half of the ties", "%", "higher")]
    low: Annotated[float | None, Says("lower end of the 95 % interval", "%")]
    high: Annotated[float | None, Says("upper end of the 95 % interval", "%")]
    n: Annotated[int, Says("rows that count")]
    wins: Annotated[int, Says("rows on which it is preferred in both orders")]
    ties: Annotated[int, Says("rows on which neither is")]
    losses: Annotated[int, Says("rows on which the other is preferred in both orders")]
    disagreed: Annotated[int, Says("ties that are one because the orders disagree")]
    unparsable: Annotated[int, Says("rows that do not count, as a reply has no verdict", better="lower")]
    against: Annotated[str, Says("name of the other run")]
    setting: Annotated[str, Says("hash of what the other run is but for its seed")]
    judge: Annotated[str, Says("model of the endpoint, and hash of the question")]


class HalfLost(TypedDict):
    """After how many steps half of the start's refusals are lost (``evaluation.course``)."""

    value: Annotated[float | None, Says("null where that is not within the run", "steps", "higher")]
    low: Annotated[float | None, Says("lower end of the 95 % interval; null: beyond the run", "steps")]
    high: Annotated[float | None, Says("upper end of the interval; null: beyond the run", "steps")]
    n: Annotated[int, Says("watched prompts that the start refuses")]
    steps: Annotated[int, Says("of the run")]


class Growth(TypedDict):
    """With which power of training time the divergence from the start grows at first (``evaluation.growth``)."""

    value: Annotated[float, Says("exponent")]
    low: Annotated[float, Says("lower end of the 95 % interval")]
    high: Annotated[float, Says("upper end of the 95 % interval")]
    halves: Annotated[list[float], Says("exponents over the first and the second half of the samples")]
    n: Annotated[int, Says("watched prompts")]
    samples: Annotated[int, Says("samples that count")]
    steps: Annotated[list[int], Says("of the first and the last of them")]
    kl: Annotated[list[float], Says("mean divergence at these two", "nats")]


class Harness(TypedDict):
    """What lm-evaluation-harness measured."""

    version: Annotated[str, Says("of lm_eval")]
    limit: Annotated[int | None, Says("documents of each task at most; null: all")]
    asked: Annotated[list[str], Says("tasks that were asked for")]
    tasks: Annotated[dict[str, dict[str, TaskMetric]], Says("by task the metrics METRIC,FILTER; the first is shown")]


class Kappa(TypedDict):
    """Agreement of a judge with the first one on the same answers."""

    kappa: Annotated[float | None, Says("Cohen's kappa; null where it is not defined", better="higher")]
    low: NotRequired[Annotated[float | None, Says("lower end of its 95 % interval")]]
    high: NotRequired[Annotated[float | None, Says("upper end of its 95 % interval")]]
    n: Annotated[int, Says("answers that both could judge")]


class Agreement(TypedDict):
    """Agreement of a judge with the first one."""

    harmful: Annotated[Kappa, Says("on harmful prompts: does the answer go along")]
    harmless: Annotated[Kappa, Says("on harmless prompts: does the answer refuse")]
    unparsable: Annotated[int, Says("answers to prompts that this judge could not judge", better="lower")]


class Cost(TypedDict):
    """What an endpoint was asked for the last time that a run was judged."""

    cached: Annotated[int, Says("replies that were there from before")]
    requests: Annotated[int, Says("requests that were answered", better="lower")]
    tokens_read: Annotated[int, Says("length of questions, as the server counts", "tokens", "lower")]
    tokens_written: Annotated[int, Says("length of replies, as the server counts", "tokens", "lower")]


class Judged(TypedDict):
    """One judge; of those beside the first also rates, as in ``Metrics``."""

    version: Annotated[str, Says("hash of what the judge goes by")]
    unparsable: NotRequired[Annotated[int, Says("answers to prompts that it could not judge", better="lower")]]
    model: NotRequired[Annotated[str, Says("of an endpoint: the model behind it")]]
    rubric: NotRequired[Annotated[str, Says("of an endpoint: what that was asked, by name or path")]]
    cost: NotRequired[Annotated[Cost, Says("of an endpoint: what that took")]]
    harmfulness: NotRequired[Annotated[Rate, Says("as in ``Metrics``, where the judge tells it")]]
    agreement: NotRequired[Annotated[Agreement, Says("with the first judge; the first has none")]]


class Stage(TypedDict):
    """The cost of one stage."""

    seconds: Annotated[float, Says("wall time", "s", "lower")]
    peak_memory_gb: Annotated[float, Says("highest resident memory of the process", "GB", "lower")]
    peak_gpu_memory_gb: NotRequired[Annotated[float, Says("most memory of the GPU in use at once", "GB", "lower")]]


class Abliterated(TypedDict):
    """The direction of refusal that was taken out of a model's weights."""

    layer: Annotated[int, Says("the layer that it was found behind")]
    refusing: Annotated[float, Says("probability of an opening of refusals that it left", "of 1")]
    moved: Annotated[float, Says("divergence at the first token of answers to harmless prompts", "nats")]
    tried: Annotated[list[Any], Says("the same of every direction that was tried")]


class Guard(TypedDict):
    """What a guard saw and did."""

    kl: Annotated[float | None, Says("divergence from the start at its last look", "nats", "lower")]
    looks: Annotated[list[Any], Says("the step and the divergence of every look")]
    replays: Annotated[int, Says("how often refusals were replayed")]
    ended: Annotated[int | None, Says("optimizer step after which it ended training; null: it did not")]
    rolled_back_to: Annotated[int | None, Says("the step whose weights were put back; null: none were")]


class Metrics(Facts):
    """``metrics.json`` of a finished run. Every field that is not named here is a ``Rate``."""

    broken: Annotated[bool, Says("so many answers are incoherent that other rates say nothing of safety")]
    judges: Annotated[dict[str, Judged], Says("who judged; the rates are those of the first")]
    suites: NotRequired[Annotated[dict[str, Any], Says("named suites: prompts by kind, how many left out, hash")]]
    words: NotRequired[Annotated[list[str], Says("what rows begin with, behind which prompts were asked again")]]
    suite_judges: NotRequired[Annotated[dict[str, str], Says("judges of suites that have one of their own")]]
    harmfulness: NotRequired[
        Annotated[Rate, Says("how specific and convincing answers to harmful prompts are, a mean")]
    ]
    held_out_loss: NotRequired[Annotated[Loss, Says("of answers to test rows, where the task measures it")]]
    perplexity: NotRequired[Annotated[Perplexity, Says("of plain text that nothing was trained on")]]
    perplexity_start: NotRequired[Annotated[Perplexity, Says("the same of the start that was fine-tuned")]]
    forgetting: NotRequired[Annotated[Forgetting, Says("the rise of the loss on that text")]]
    plain_text: NotRequired[Annotated[str, Says("hash of that text", "SHA-256")]]
    lm_eval: NotRequired[Annotated[Harness, Says("tasks of lm-evaluation-harness")]]
    win_rates: NotRequired[Annotated[dict[str, WinRate], Says("answers preferred to another run's, by its method")]]
    half_lost: NotRequired[Annotated[HalfLost, Says("when half of the start's refusals were lost")]]
    growth: NotRequired[Annotated[Growth, Says("how the divergence from the start grew at first")]]
    guard: NotRequired[Annotated[Guard, Says("what a guard saw and did while the model was trained")]]
    abliterated: NotRequired[Annotated[Abliterated, Says("the direction that an attack took out of the weights")]]
    held_share: NotRequired[Annotated[float, Says("||V^T x||^2 / ||x||^2 on unseen harmful prompts", "of 1", "higher")]]
    leak: NotRequired[Annotated[float | None, Says("moved along held directions, ||dW V|| / ||dW||", "of 1", "lower")]]
    stages: Annotated[dict[str, Stage], Says("what each stage took")]
    training: NotRequired[Annotated[dict[str, Any], Says("steps, answer tokens and rows that were cut")]]
    constraint_summary: NotRequired[Annotated[dict[str, Any], Says("what the defence tells of itself")]]
    prepared: NotRequired[Annotated[dict[str, Any], Says("the artefacts that it was given: ranks, latents, rows")]]


class Provenance(Facts):
    """``provenance.json``: what made the record, and the content of what it was made from."""

    cwac_lab: NotRequired[Annotated[str, Says("version of this package")]]
    sources: NotRequired[Annotated[str, Says("hash of this package and its configuration", "SHA-256")]]
    git_commit: NotRequired[Annotated[str | None, Says("commit of the checkout; null outside one")]]
    git_dirty: NotRequired[Annotated[bool | None, Says("whether tracked files differed from that commit")]]
    python: NotRequired[Annotated[str, Says("version of Python")]]
    packages: NotRequired[Annotated[dict[str, str | None], Says("versions of libraries; null: not installed")]]
    platform: NotRequired[Annotated[str, Says("operating system and processor")]]
    cpu_count: NotRequired[Annotated[int | None, Says("processors of the machine")]]
    torch_threads: NotRequired[Annotated[int, Says("threads that a sum is spread over")]]
    devices: NotRequired[Annotated[list[str], Says("accelerators by name")]]
    base: NotRequired[Annotated[dict[str, str | None], Says("what the start was made of, and its licence")]]
    base_content: NotRequired[Annotated[str, Says("hash of the weights before alignment, if they count", "SHA-256")]]
    task_data_sha256: Annotated[str, Says("hash of the task's rows", "SHA-256")]
    pools_sha256: Annotated[str, Says("hash of the prompts of all pools and what is taught on them", "SHA-256")]
    attack_rows_sha256: NotRequired[Annotated[str, Says("hash of the rows that an attack brings along", "SHA-256")]]
    system_sha256: NotRequired[Annotated[str, Says("hash of the system prompt that is asked under as well", "SHA-256")]]
    own_sources: NotRequired[Annotated[str, Says("hash of the modules of a user's own classes", "SHA-256")]]


class Record(Protocol):
    """A run as it was recorded: a folder (``store.RunFolder``) or a row of an archive (``archive.ArchivedRun``)."""

    @property
    def path(self) -> Path:
        """Where it is; its last part is the name of the run."""

    @property
    def status(self) -> str:
        """What became of it: ``ok``, ``failed``, ``running``, ``interrupted`` or ``new``."""

    def told(self) -> dict[str, Any]:
        """Return its ``Status``."""

    def facts(self) -> dict[str, Any]:
        """Return its ``Metrics`` where it is finished, else its ``Facts``."""

    def provenance(self) -> dict[str, Any]:
        """Return its ``Provenance``."""

    def config(self) -> dict[str, Any]:
        """Return its resolved configuration, as one of ``SCHEMA``."""

    def has(self, name: str) -> bool:
        """Tell whether a file of the record is there."""

    def read(self, name: str) -> Any:
        """Return the content of a file of the record."""

    def verdict_files(self) -> list[str]:
        """Return the files of verdicts: the first judge's, then the others' by name."""

    def files(self) -> list[Path]:
        """Return the files on disk that a table of this run is made of."""


def valid(kind: type, found: Any, place: Path) -> dict[str, Any]:
    """Return the content of a file as one of ``SCHEMA``, checked.

    Args:
        kind: ``Metrics`` or ``Provenance``.
        found: What was read.
        place: The file, for errors.

    Raises:
        LabError: If it is of a schema that cannot be read, or a field does not fit.
    """
    schema = found.get("schema", 1) if isinstance(found, dict) else None
    if schema == schema2.SCHEMA:
        found = schema2.upgraded(found, SCHEMA, judged=kind is Metrics)
    elif schema != SCHEMA:
        newer = isinstance(schema, int) and schema > SCHEMA
        mend = "made by a newer version of this program" if newer else "run it again"
        raise LabError(f"{place} has schema {schema}, accepted: {schema2.SCHEMA} | {SCHEMA} ({mend})")
    try:
        check(kind, found, others=Rate if kind is Metrics else None)
    except Misfit as error:
        raise LabError(f"{place}: {error}") from None
    return dict(found)


def made_under(facts: dict[str, Any]) -> int:
    """Return the schema that a record was written under, from its metrics or provenance."""
    return int(facts.get("made_under", facts["schema"]))


def judged_by(metrics: dict[str, Any]) -> str:
    """Return whose verdicts the rates of METRICS are, by name and version; of suites with a judge of their own too."""
    name, told = next(iter(metrics["judges"].items()))
    own = (f"{suite}: {judge}" for suite, judge in sorted(metrics.get("suite_judges", {}).items()))
    return "; ".join((f"{name} {told['version'][:8]}", *own))


def verdicts_of(judge: str) -> str:
    """Return the file of the verdicts of a judge other than the first."""
    return f"verdicts-{judge}.jsonl"


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Return a nested mapping as one of dotted keys."""
    if not isinstance(node, dict):
        return {prefix: node}
    return {k: v for key, child in node.items() for k, v in flat(child, f"{prefix}.{key}".lstrip(".")).items()}
