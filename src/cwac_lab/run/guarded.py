"""The guard of a run: which prompts it watches, and what a record says of it."""

from __future__ import annotations

from typing import Any

from cwac_lab.config.run import Run
from cwac_lab.core.errors import ConfigError
from cwac_lab.defenses.interface import Context
from cwac_lab.diagnostics.divergence import Divergence
from cwac_lab.models.chat import IGNORED, ChatFormat, Encoded
from cwac_lab.results import store
from cwac_lab.results.store import RunFolder
from cwac_lab.training.guard import Guard


def own_refusals(context: Context) -> list[Encoded]:
    """Return the start's own refusals to the harmful reference prompts, as rows to train on.

    With ``data.reference=all`` nothing was asked of the start, and they are the project's.
    """
    rows = zip(context.reference, context.own_refusals, strict=False)  # other forms of the prompts follow
    whole = [(len(prompt), ids) for prompt, ids in rows if ids[: len(prompt)] == prompt]  # none that had to be cut
    return [Encoded(ids, [IGNORED] * length + ids[length:]) for length, ids in whole]


def guard(run: Run, start: Any, chat: ChatFormat, context: Context, folder: RunFolder) -> Guard | None:
    """Return the guard of a run, where it has one.

    Args:
        run: The run.
        start: The start model.
        chat: Its chat format.
        context: What ``artefacts`` returned.
        folder: The run's folder, in which it keeps its state.

    Raises:
        ConfigError: If no refusal is as short as a row may be.
    """
    if run.guard.kl is None:
        return None
    rows = own_refusals(context)
    if not rows:
        accepted = "null, or trainer.max_length for a prompt and its refusal"
        raise ConfigError("guard.kl", run.guard.kl, accepted)
    watched, others = rows[: run.guard.n_prompts], rows[run.guard.n_prompts :]
    look = Divergence(start, watched, chat.pad_id)
    # What a replay trains on is not what is watched, where there is more.
    return Guard(run.guard, look, others or watched, chat.pad_id, run.seed, folder.path / store.GUARD)


def told(found: dict[str, Any]) -> str:
    """Return a guard's facts in one line."""
    did = "nothing was done"
    if found["ended"] is not None:
        did = f"training ended after {found['ended']} steps"
        back = found["rolled_back_to"]
        did += "" if back is None else f", with the weights after {back}"
    elif found["replays"]:
        did = f"refusals were replayed {found['replays']} times"
    last = "" if found["kl"] is None else f"; divergence at the last look {found['kl']:.3f} nats"
    return f"guard: {did}{last}"
