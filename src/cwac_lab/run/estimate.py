"""What a run would take, before weights are loaded: rows, steps, memory, disk and, roughly, hours."""

from __future__ import annotations

import copy
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cwac_lab.config.run import Run, check_machine
from cwac_lab.core.errors import ConfigError
from cwac_lab.core.progress import duration
from cwac_lab.data.batches import plan_batches
from cwac_lab.data.forms import SYSTEM, WORDS
from cwac_lab.data.pools import build_pools
from cwac_lab.defenses.cwac.subspace.parts import parts_of
from cwac_lab.defenses.cwac.weight import WeightConstraint
from cwac_lab.evaluation.metrics import form_of
from cwac_lab.evaluation.protocol import evaluation_rows, suite_rows
from cwac_lab.models.adapters import TuningConfig, attach
from cwac_lab.models.chat import Encoded
from cwac_lab.models.few_bits import BLOCK
from cwac_lab.models.folder import skeleton
from cwac_lab.models.loading import find, load_chat
from cwac_lab.models.sites import linears
from cwac_lab.results import store
from cwac_lab.run import operations
from cwac_lab.run.beforehand import check_course
from cwac_lab.run.protected import few_tokens
from cwac_lab.run.push import check as check_push
from cwac_lab.run.push import listed
from cwac_lab.run.rows import encoded, train_rows, words_of
from cwac_lab.run.start import use_of
from cwac_lab.run.suite_answers import chosen
from cwac_lab.run.survey import survey, told

# Rows and columns of the matrices whose product tells how fast a device computes, and for how long it is taken.
_SIDE, _SECONDS = 1024, 1.0
# What share of an input's directions is guessed to be free where prompts have more tokens than it is wide. It
# was 0.05 of the weights of SmolLM2-135M, and 0.29 of Qwen2.5-Coder-0.5B's: its FFN is wider than prompts have tokens.
FREE = 0.1
# Bytes of a number in NF4: 4 bits, and a scale in float32 for each block.
_NF4 = 0.5 + 4 / BLOCK
# Share of that speed which training reaches, in our runs on CPUs: 0.4 to 0.9.
_REACHED = 0.5
_GB = 1e9


@dataclass(frozen=True)
class Estimate:
    """What a run would take.

    Attributes:
        rows: Examples of a pass.
        steps: Optimizer steps.
        tokens: Tokens of all steps, without padding.
        parameters: Of the model.
        trained: Parameters that are trained.
        guessed: Whether that is a guess.
        memory: Bytes of weights, gradients and AdamW's moments; activations come on top.
        kept: Bytes of what the constraint keeps beside them, copies of weights or a basis.
        merged: Bytes of the model once it is merged, where it was held in fewer bits.
        disk: Bytes that are written at most: what is saved, and two checkpoints, while one takes the other's place.
        seconds: Of training, roughly.
    """

    rows: int
    steps: int
    tokens: int
    parameters: int
    trained: int
    guessed: bool
    memory: int
    kept: int
    merged: int
    disk: int
    seconds: float

    def lines(self) -> Iterator[str]:
        """Yield it in words."""
        yield f"{self.rows} examples, {self.steps} steps, {self.tokens} tokens"
        guess = ", about (python -m cwac_lab.prepare tells what share is free)" if self.guessed else ""
        yield f"{self.parameters / 1e6:.0f} M parameters, {self.trained / 1e6:.1f} M of them trained{guess}"
        kept = f", {self.kept / _GB:.1f} GB for what the constraint keeps" if self.kept else ""
        yield f"memory: {self.memory / _GB:.1f} GB for weights, gradients and moments{kept}; activations come on top"
        if self.merged:
            yield f"memory at the end: {self.merged / _GB:.1f} GB for the merged model in float32"
        yield f"disk: {self.disk / _GB:.1f} GB"
        yield f"training: about {duration(self.seconds)}; preparing and evaluating come on top"


def trained_parameters(model: Any, tuning: TuningConfig, protected: int | None = None) -> int:
    """Return how many parameters a run trains, before a constraint freezes any; with ``null_space`` about how many.

    Args:
        model: The model, on the meta device, where a copy takes no memory.
        tuning: What is trained.
        protected: The most directions that can be protected of an input, where that is known.
    """
    if tuning.method == "full":
        return sum(parameter.numel() for parameter in model.parameters())
    if tuning.method == "null_space":
        return sum(rows * _factors(tuning, width, protected) for rows, width in _adapted(model, tuning))
    adapted = copy.deepcopy(model)
    attach(adapted, replace(tuning, base="float32"), seed=0)
    return sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)


def _adapted(model: Any, tuning: TuningConfig) -> list[tuple[int, int]]:
    """Return rows and columns of the layers that get factors."""
    adapted = copy.deepcopy(model)
    attach(adapted, replace(tuning, method="lora", base="float32"), seed=0)
    return [(layer.out_features, layer.in_features) for layer in adapted.modules() if hasattr(layer, "lora_A")]


def _free(width: int, protected: int | None) -> int:
    """Return about how many of an input's directions are free."""
    return max(round(FREE * width), width - (width if protected is None else min(protected, width)))


def _alone(run: Run) -> str | None:
    """Return the scope that trains where a constraint freezes all else; None where it does not."""
    parts = (part for part in run.constraint.parts.values() if isinstance(part, WeightConstraint))
    return next((part.modules for part in parts if part.trainable == "constrained"), None)


def _factors(tuning: TuningConfig, width: int, protected: int | None) -> int:
    """Return about how many free directions of an input have factors."""
    free = _free(width, protected)
    return free if tuning.free_directions is None else min(tuning.free_directions, free)


def _spans(run: Run, model: Any, protected: int | None) -> int:
    """Return about how many numbers the spans have that a run holds: of an input's directions the fewer, those or U."""
    spec = run.constraint.requirements.subspace
    if spec is None:
        return 0
    widths = {linear.site: linear.width for linear in linears(model, spec.modules)}
    return sum(width * min(_free(width, protected), width - _free(width, protected)) for width in widths.values())


def most_protected(run: Run, reference: Sequence[Sequence[int]]) -> int | None:
    """Return the most directions that a run can protect of an input: no more than its reference prompts have tokens.

    None where it is not known, or where other tokens count as well: answers, harmless prompts, other forms.

    Args:
        run: The run.
        reference: Harmful reference prompts as token ids.
    """
    spec = run.constraint.requirements.subspace
    if spec is None or not reference or (spec.held_on, spec.answers) != ("harmful", "none") or run.forms.others:
        return None
    opening = parts_of(reference)[0].opening
    own = spec.rank if spec.rank is not None else sum(len(ids) - opening for ids in reference)
    return own + (opening if spec.opening == "held" or spec.rank is None else 0)


def _few(run: Run, model: Any, reference: Sequence[Sequence[int]]) -> list[str]:
    """Return a line where a run's reference prompts, all of them, have fewer tokens than a layer has inputs."""
    spec, most = run.constraint.requirements.subspace, most_protected(run, reference)
    if spec is None or spec.rank is not None or most is None:
        return []
    line = few_tokens(most, {linear.site.name: linear.width for linear in linears(model, spec.modules)})
    return [line] if line else []


def estimate(run: Run, model: Any, examples: Sequence[Encoded], reference: Sequence[Sequence[int]] = ()) -> Estimate:
    """Return what a run would take.

    Args:
        run: The run.
        model: Its model on the meta device.
        examples: The rows that are trained on.
        reference: Its harmful reference prompts as token ids.
    """
    trainer = run.trainer
    lengths = [len(example.input_ids) for example in examples]
    plan = plan_batches(lengths, trainer.batch_size * trainer.accumulate, trainer.epochs, run.seed)[: trainer.max_steps]
    tokens = sum(lengths[row] for rows in plan for row in rows)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    most, guessed, fixed, width = most_protected(run, reference), False, 0, run.dtype.itemsize
    trained = trained_parameters(model, run.tuning, most)
    if run.tuning.method == "full" and (alone := _alone(run)) is not None:
        trained = sum(matrix.weight.numel() for matrix in linears(model, alone))
    adapted = _adapted(model, run.tuning) if run.tuning.adapts else []
    if run.tuning.method == "null_space":
        known = [columns - most for _, columns in adapted] if most is not None else [0]
        guessed = run.tuning.free_directions is None or run.tuning.free_directions > min(known)
        fixed = sum(columns * _factors(run.tuning, columns, most) for _, columns in adapted)
    pieces = trainer.accumulate * trainer.devices
    work = operations.training(
        model, examples, [step[piece::pieces] for step in plan for piece in range(pieces)], trained,
        factors=trained + fixed if run.tuning.adapts else 0, alone=trainer.strategy == "fsdp",
        checkpointing=trainer.gradient_checkpointing,
    )  # fmt: skip
    # Gradients and moments, and with factors these themselves.
    memory = width * parameters + (8 + (8 if run.tuning.adapts else width)) * trained
    if run.tuning.base == "nf4":
        memory -= round((width - _NF4) * sum(rows * columns for rows, columns in adapted))
    merged = 4 * parameters if run.tuning.dtype is not None else 0
    kept = round(run.constraint.copies * width * trained)
    if run.tuning.adapts:
        kept = 4 * (fixed + _spans(run, model, most))
    disk = sum(saved(run, parameters, trained + fixed).values()) + checkpoints(run, trained, fixed)
    at_once = 1 if trainer.device.type == "cpu" else trainer.devices  # processes share the cores of a CPU
    return Estimate(
        len(examples), len(plan), tokens, parameters, trained, guessed, memory, kept, merged, disk,
        work / (_REACHED * at_once * speed(trainer.device, run.dtype)),
    )  # fmt: skip


def saved(run: Run, parameters: int, factors: int) -> dict[str, int]:
    """Return the bytes of what a run saves in the end, by name.

    Args:
        run: The run.
        parameters: Of its model.
        factors: Numbers of its factors, where it has any.
    """
    width = 4 if run.tuning.adapts else run.dtype.itemsize  # adapters are merged in float32
    sizes = {store.MODEL: width * parameters, store.ADAPTER: 4 * factors}
    return {name: sizes[name] for name in run.tuning.saved} if run.trainer.export else {}


def checkpoints(run: Run, trained: int, fixed: int = 0) -> int:
    """Return the bytes of a run's checkpoints: weights and moments, the one before until the next is whole."""
    return 2 * (12 * trained + 4 * fixed) if run.trainer.checkpoint_every_n_steps else 0


def check_room(run: Run, folder: Path) -> None:
    """Check that what a run saves finds room under its ``output_root``, from the model's configuration alone.

    Args:
        run: The run.
        folder: Of its start.

    Raises:
        ConfigError: If the disk has less free.
    """
    export, every = run.trainer.export, run.trainer.checkpoint_every_n_steps
    if not run.finetune or not (export or every):
        return
    model = skeleton(folder)
    parameters, trained = sum(each.numel() for each in model.parameters()), 0
    if run.tuning.method != "null_space":  # a guess refuses no run
        trained = trained_parameters(model, run.tuning)
    needed = sum(saved(run, parameters, trained).values()) + checkpoints(run, trained)
    root = Path(run.output_root).absolute()
    free = shutil.disk_usage(next(place for place in (root, *root.parents) if place.is_dir())).free
    if needed > free:
        room = f"{needed / _GB:.3g} GB free in output_root={run.output_root} ({free / _GB:.3g} GB are)"
        key, value, without = ("export", True, "false") if export else ("checkpoint_every_n_steps", every, "0")
        raise ConfigError(f"trainer.{key}", value, f"{without}, or {room}")


def tell(run: Run, say: Callable[[str], None]) -> None:
    """Tell what a run would take; reads rows and the tokenizer, loads no weights and writes no record.

    Raises:
        ConfigError: If rows are chosen by gradients of the model, or nothing is fine-tuned.
        LabError: As the run itself, for what it reads; and if what it saves finds no room.
    """
    if not run.finetune:
        raise ConfigError("dry", True, "false with finetune=false: nothing is trained")
    if run.attack.rows == "outliers":
        raise ConfigError("dry", True, f"false with attack={run.attack.name}, which chooses rows by gradients")
    check_machine(run)
    check_push(run)
    pools = build_pools(run.data)
    data = pools.task_rows(run.data, run.task)
    folder = find(run.model, run.profile.name, Path(run.cache_root), use_of(run))
    chat = load_chat(folder.path, run.trainer.max_length, run.model.chat_template)
    rows = train_rows(run, data.train, pools, None, chat, say)
    examples = encoded(rows, chat, run.task.train_on, say)
    check_course(run, pools, examples)
    lines = [*run.task.remarks, *data.remarks, *told(survey(rows, examples, pools.harmful()))]
    reference = [chat.prompt_ids(row.prompt) for row in pools.get("harmful", "reference")]
    model = skeleton(folder.path)
    found = estimate(run, model, examples, reference)
    lines += _few(run, model, reference)
    words = words_of(run, rows, lines.append)
    suites = chosen(run, pools, data, lines.append)
    asked = evaluation_rows(run, pools, data, words) | suite_rows(run, suites)
    lines = [folder.description, *lines, *found.lines(), _evaluated(asked)]
    if run.export.push is not None:
        lines.append(listed(run.export, saved(run, found.parameters, found.trained)[run.tuning.saved[0]]))
    for line in lines:
        say(line)
    check_room(run, folder.path)


def _evaluated(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Return in words how many answers an evaluation asks for."""
    asked = [row for held in rows.values() for row in held]
    extra = {
        "under the system prompt (task.system_rates=false": sum(form_of(row) == SYSTEM for row in asked),
        "behind words of rows (evaluation.words_rates=false": sum(form_of(row) == WORDS for row in asked),
    }
    more = "".join(f", {n} of them {where} leaves these out)" for where, n in extra.items() if n)
    return f"evaluation: {len(asked)} answers{more}"


def speed(device: torch.device, dtype: torch.dtype) -> float:
    """Return how many floating-point operations a second a device makes in products of matrices."""
    x = torch.ones(_SIDE, _SIDE, device=device, dtype=dtype)
    float((x @ x).sum())  # the first one warms up
    best, ends = math.inf, time.perf_counter() + _SECONDS
    while time.perf_counter() < ends:  # the best of many: other programs may hold the processor for a moment
        begin = time.perf_counter()
        float((x @ x)[0, 0])
        best = min(best, time.perf_counter() - begin)
    return 2 * _SIDE**3 / best
