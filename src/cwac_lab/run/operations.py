"""How many multiplications and additions the training of a run takes, counted without a weight in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cwac_lab.models.chat import IGNORED, Encoded
from cwac_lab.models.prefix import shared_length
from cwac_lab.models.sites import EXPERTS, decoder_layers


def training(
    model: Any, rows: Sequence[Encoded], forwards: Sequence[Sequence[int]], trained: int, *, factors: int = 0,
    alone: bool = False, checkpointing: bool = False,
) -> float:  # fmt: skip
    """Return the floating-point operations of a run's steps, as Kaplan et al. (2020, arXiv 2001.08361) count them.

    Two a weight and token forward, two backward for what flows through, two more where the weight trains. As the loop
    does it, an opening that a forward's rows share counts once, and the head at answer tokens only; a look-up of an
    embedding is none. What attention multiplies besides its weights is left out, and so is what a constraint adds.

    Args:
        model: The model, on the meta device.
        rows: What is trained on.
        forwards: The rows of each forward.
        trained: How many weights train; all of the model, or some of its layers or of the factors beside them.
        factors: How many numbers the factors beside the layers have, those that do not train among them.
        alone: Whether every row computes its opening itself.
        checkpointing: Whether layers are computed again backward; every row computes its opening then.
    """
    layers = sum(weight.numel() for weight in decoder_layers(model).parameters())
    whole = sum(weight.numel() for weight in model.parameters())
    all_of_it = not factors and trained == whole
    inside = trained - (whole - layers) if all_of_it else trained
    tokens = sum(_tokens([rows[at] for at in each], alone=alone or checkpointing) for each in forwards if each)
    answers = sum(sum(label != IGNORED for label in rows[at].labels) for each in forwards for at in each)
    through = (6 if checkpointing else 4) * (layers + factors) + 2 * inside
    head = (6 if all_of_it else 4) * model.get_output_embeddings().weight.numel()
    return tokens * used_share(model) * through + answers * head


def _tokens(rows: Sequence[Encoded], *, alone: bool) -> int:
    """Return the tokens that one forward computes."""
    total = sum(len(row.input_ids) for row in rows)
    first = min(next(at for at, label in enumerate(row.labels) if label != IGNORED) for row in rows)
    opening = 0 if alone else shared_length([row.input_ids for row in rows], first - 1)
    return total - (len(rows) - 1) * opening


def used_share(model: Any) -> float:
    """Return the share of its layers' weights that a token goes through: of a mixture not the experts it passes by."""
    config = model.config
    of = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    if not of:
        return 1.0
    sizes = {name: each.numel() for name, each in decoder_layers(model).named_parameters()}
    experts = sum(size for name, size in sizes.items() if f".{EXPERTS}." in name)
    return 1 - experts * (1 - config.num_experts_per_tok / of) / sum(sizes.values())
