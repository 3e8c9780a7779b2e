"""Build the probe of a run: its held-out prompts, its start, and the subspace and latents that drift is told in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor

from cwac_lab.config import Run
from cwac_lab.defense import Context
from cwac_lab.diagnostics.probe import Probe
from cwac_lab.diagnostics.stream import Explains
from cwac_lab.errors import ConfigError
from cwac_lab.evaluation.generate import answers
from cwac_lab.models.chat import ChatFormat, Encoded
from cwac_lab.preparation import Start, autoencoders
from cwac_lab.sae import train as sae_train

# The pools that drift is measured on: no constraint has seen them, and the task does not train on them.
_POOLS = {"harmful": "harmful", "benign": "harmless"}
# As long as the start's answer is looked at.
_ANSWER_TOKENS = 8


def probe(
    run: Run, begin: Start, model: Any, chat: ChatFormat, context: Context, explains: dict[int, Explains] | None = None
) -> Probe:
    """Return the probe of a run on the prompts of its evaluation's split.

    Args:
        run: The run; its constraint does not matter.
        begin: Its start.
        model: The start model, loaded.
        chat: Its chat format.
        context: Reader of start weights; subspace and latents, where there are any.
        explains: By layer, how well an autoencoder of the start describes activations.

    Raises:
        ConfigError: If the split has too few prompts of a kind.
    """
    split, most = run.evaluation.split, run.diagnostics.n_prompts
    rows = {kind: begin.pools.get(pool, split)[:most] for kind, pool in _POOLS.items()}
    for kind, held in rows.items():
        if len(held) < 2:
            raise ConfigError(f"data.{_POOLS[kind]}.{split}", len(held), ">= 2 prompts to measure drift on")
    texts = {kind: [row.prompt for row in held] for kind, held in rows.items()}
    answered: dict[str, Sequence[Encoded]] = {}
    for kind, asked in texts.items():
        given = answers(model, chat, asked, _ANSWER_TOKENS, run.evaluation.batch_size)
        answered[kind] = [  # of an answer without text the end stands for its first token
            chat.encode_own(prompt, answer.text, ended=answer.ended or not answer.text)
            for prompt, answer in zip(asked, given, strict=True)
        ]
    return Probe(
        model, answered, chat.pad_id, context.start_weight,
        subspace=context.subspace, features=context.features, explains=explains,
    )  # fmt: skip


def measured_in(facts: dict[str, Any]) -> dict[str, str]:
    """Return the artefacts that drift is told in, of the facts that ``artefacts`` returns."""
    return {name: str(facts[name]["folder"]) for name in ("subspace", "features") if name in facts}


def explaining(run: Run, begin: Start, model: Any, chat: ChatFormat, say: Callable[[str], None]) -> dict[int, Explains]:
    """Return, by layer that the run's constraint hooks, what tells how well its autoencoder describes activations."""
    return {
        layer: partial(_explained, sae_train.load(folder))
        for layer, folder in autoencoders(run, begin, model, chat, say).items()
    }


def _explained(autoencoder: Any, x: Float[Tensor, "N D"]) -> float:
    return sae_train.quality(autoencoder, x)["explained_variance"]
