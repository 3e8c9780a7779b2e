"""How far a model is from another of its architecture: the next words of both on the same prompts, and their weights.

One model is in memory at a time: of the first its log-probabilities stay. Weights are read tensor by tensor.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from cwac_lab.config.run import Run
from cwac_lab.core import recipes
from cwac_lab.core.cache import cached_folder, digest, read_json, reading, write_json
from cwac_lab.core.errors import ConfigError
from cwac_lab.core.gpus import one_of_several
from cwac_lab.core.stats import mean_per
from cwac_lab.data.batches import collate
from cwac_lab.data.forms import OWN
from cwac_lab.diagnostics.alike import check_alike
from cwac_lab.diagnostics.stream import divergences
from cwac_lab.evaluation.metrics import form_of
from cwac_lab.evaluation.protocol import prompt_of
from cwac_lab.models.answers import answer_logits, to_device
from cwac_lab.models.chat import IGNORED, ChatFormat, Encoded
from cwac_lab.models.folder import headers, weight_files
from cwac_lab.models.sites import stored
from cwac_lab.run.start import Start, start, start_weights

Rows = Sequence[dict[str, Any]]
HEADS = ("drift", "value [95 % interval]", "n")
KINDS = ("harmful", "harmless")
FOUND = "drift.json"
# Files of GPT-2 hold masks beside weights: tensors of so many dimensions.
_MASK = 4
# Kinds of tensors by their names; the first that fits counts.
_PARTS = {
    "norms": re.compile(r"norm|ln_"),
    "embeddings": re.compile(r"embed|wte|wpe"),
    "output head": re.compile(r"lm_head"),
    "attention": re.compile(r"attn|attention"),
    "feed-forward layers": re.compile(r"mlp|feed_forward|moe|experts"),
    "other tensors": re.compile(""),
}
# Numbers of a tensor that are compared at once.
_MOST = 2**22


@dataclass(frozen=True)
class Apart:
    """How far two models are apart.

    Attributes:
        rows: Texts by column of ``HEADS``; none where it is not told.
        remarks: What is left out or taken on trust, each in a line.
    """

    rows: list[list[str]]
    remarks: list[str]


def apart(runs: Sequence[Run], rows: Rows) -> Apart:
    """Return how far the second of two runs' starts is from the first; kept, so that it is measured once.

    Args:
        runs: Two runs that fine-tune nothing.
        rows: What both were asked (rows of ``generations.jsonl``).

    Raises:
        LabError: If a model cannot be loaded.
    """
    begins = [start(run, lambda _: None) for run in runs]
    try:
        remarks = check_alike(*(begin.folder.path for begin in begins))
    except ConfigError as error:
        return Apart([], [f"drift is not told: it needs {error.accepted}"])
    asked = [row for row in rows if row["kind"] in KINDS and form_of(row) == OWN and "suite" not in row]
    key = recipes.DRIFT.key(
        before=begins[0].folder.content,
        after=begins[1].folder.content,
        dtype=[str(run.dtype) for run in runs],
        prompts=digest([[row["kind"], row["prompt"], row.get("before"), row.get("opening")] for row in asked]),
        templates=[[run.attack.template, run.model.chat_template] for run in runs],
    )

    def build(folder: Path) -> None:
        found = _measured(runs, begins, asked)
        write_json(folder / FOUND, {"rows": found.rows, "remarks": found.remarks})

    kept = cached_folder(Path(runs[0].cache_root), recipes.DRIFT.kind, key, build)
    with reading(kept):
        found = read_json(kept / FOUND)
    return Apart(found["rows"], remarks + found["remarks"])


def _measured(runs: Sequence[Run], begins: Sequence[Start], asked: Rows) -> Apart:
    before, after = (begin.folder.path for begin in begins)
    remarks: list[str] = []
    first, second = (_seen(run, begin, asked) for run, begin in zip(runs, begins, strict=True))
    told: list[list[str]] = []
    if first.log_probs.shape == second.log_probs.shape:  # else of other vocabularies, which is told
        told += _next_words(asked, divergences(first.log_probs, second.log_probs))
        if first.template != second.template:
            remarks.append("the chat templates differ: each model is asked in its own")
    distances, left_out = weight_distances(before, after)
    told += [
        [f"weights, {part}: ||W - W0|| / ||W0||", f"{value:.3g}", str(n)] for part, (value, n) in distances.items()
    ]
    if left_out:
        remarks.append(f"weights: {left_out} tensors are left out, which only one of the two has in that shape")
    return Apart(told, remarks)


def _next_words(asked: Rows, found: Float[Tensor, " N"]) -> Iterator[list[str]]:
    """Yield the mean divergence on prompts of each kind, with Student's interval over prompts."""
    for kind in KINDS:
        values = [float(value) for row, value in zip(asked, found, strict=True) if row["kind"] == kind]
        mean = mean_per(values, [1] * len(values))
        if mean.value is not None:
            span = "" if mean.low is None or mean.high is None else f" [{max(mean.low, 0):.3g}, {mean.high:.3g}]"
            yield [
                f"KL(before || after) of the next token, {kind} prompts, nats",
                f"{mean.value:.3g}{span}",
                str(mean.n),
            ]


class _Seen(NamedTuple):
    """What a model would say next to N rows, and the chat template that they were asked in."""

    log_probs: Float[Tensor, "N V"]
    template: str


def _seen(run: Run, begin: Start, asked: Rows) -> _Seen:
    """Return what a model would say next to each row; the model is gone afterwards."""
    with one_of_several(run.trainer.device):
        model, chat = begin.load(run)
        asking = chat.with_template(run.attack.template)
        prompts = [[*asking.prompt_ids(prompt_of(row)), *asking.tokens(row.get("opening", ""))] for row in asked]
        found = next_log_probs(model, asking, prompts, run.evaluation.batch_size)
    del model
    gc.collect()
    return _Seen(found, str(asking.tokenizer.chat_template))


@torch.inference_mode()
def next_log_probs(
    model: Any, chat: ChatFormat, prompts: Sequence[Sequence[int]], batch_size: int
) -> Float[Tensor, "N V"]:
    """Return the log-probabilities of the token after each of N prompts, in float32 in the memory of the CPU.

    Args:
        model: A causal language model in evaluation mode.
        chat: Its chat format.
        prompts: Prompts as token ids.
        batch_size: Prompts per forward.
    """
    # The end stands for the token that is asked for; which one it is does not matter.
    rows = [Encoded([*ids, chat.end_id], [IGNORED] * len(ids) + [chat.end_id]) for ids in prompts]
    order = sorted(range(len(rows)), key=lambda place: len(prompts[place]))
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    for begin in range(0, len(rows), batch_size):
        part = order[begin : begin + batch_size]
        logits, _ = answer_logits(model, to_device(collate([rows[i] for i in part], chat.pad_id), model.device))
        for place, each in zip(part, logits.float().log_softmax(-1).cpu(), strict=True):
            found[place] = each
    return torch.stack(found) if found else torch.empty(0, 0)


def weight_distances(before: Path, after: Path) -> tuple[dict[str, tuple[float, int]], int]:
    """Return ``||W - W0|| / ||W0||`` over all tensors of a kind, and their number; and how many have no counterpart.

    Norms are Frobenius norms of all tensors of the kind together, summed in float64.

    Args:
        before: Folder of the model with the weights W0.
        after: Folder of the other one.
    """
    first, second = (
        {
            name: each.shape
            for name, each in headers(weight_files(folder)).items()
            if each.is_floating_point() and each.ndim < _MASK
        }
        for folder in (before, after)
    )
    twins = {name: twin for name in first if (twin := stored(name, second)) is not None}
    twins |= {name: twin for twin in second if (name := stored(twin, first)) is not None}
    shared = {name: twin for name, twin in twins.items() if first[name] == second[twin]}
    read, reread = start_weights(before), start_weights(after)
    sums: dict[str, tuple[float, float, int]] = {}
    for name, twin in shared.items():
        part = next(kind for kind, pattern in _PARTS.items() if pattern.search(name))
        moved, norm = _squares(read(name), reread(twin))
        held = sums.get(part, (0.0, 0.0, 0))
        sums[part] = held[0] + moved, held[1] + norm, held[2] + 1
    parts = [(part, *sums[part]) for part in _PARTS if part in sums]
    found = {part: ((moved / norm) ** 0.5, n) for part, moved, norm, n in parts if norm}
    return found, len(first) + len(second.keys() - set(twins.values())) - len(shared)


def _squares(w0: Tensor, w: Tensor) -> tuple[float, float]:
    """Return the sums of squares of ``w - w0`` and of ``w0``."""
    moved = norm = 0.0
    for before, after in zip(*(torch.split(each.flatten(), _MOST) for each in (w0, w)), strict=True):
        start = before.double()
        moved, norm = moved + float((after.double() - start).square().sum()), norm + float(start.square().sum())
    return moved, norm
