"""Build and cache what a constraint needs: ``python -m cwac_lab.prepare model=qwen constraint=coupled``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from cwac_lab.core import cli

if TYPE_CHECKING:
    from cwac_lab.config.run import Run
    from cwac_lab.defenses.interface import Context
    from cwac_lab.models.chat import ChatFormat
    from cwac_lab.run.start import Start


def _covered(
    run: Run, begin: Start, context: Context, facts: dict[str, Any], chat: ChatFormat
) -> Iterator[tuple[str, float]]:
    """Yield how much of the inputs is held: of the reference prompts, form by form, and of the prompts to come."""
    from cwac_lab.defenses.cwac.subspace.basis import covered

    spec, subspace = run.constraint.requirements.subspace, context.subspace
    assert spec is not None
    assert subspace is not None
    at = 0
    for name, n in {"as they stand": facts["reference"]["kept"], **facts["reference"].get("forms", {})}.items():
        if n:
            ids = context.reference[at : at + n]
            yield f"harmful reference prompts, {name}", covered(context.model, ids, subspace, spec, chat.pad_id)
        at += n
    asking = chat.with_template(run.attack.template)
    for kind in ("harmful", "harmless"):
        rows = begin.pools.get(kind, run.evaluation.split)
        ids = [asking.prompt_ids(run.attack.asked(row.prompt)) for row in rows]
        name = f"{kind} prompts of {run.evaluation.split} as attack={run.attack.name} asks"
        if ids:
            yield name, covered(context.model, ids, subspace, spec, chat.pad_id)


def main(config: DictConfig) -> None:
    """Align where needed, then build subspace, autoencoder and latents."""
    from cwac_lab.config.run import read

    run = read(config)
    from cwac_lab.results.console import Screen
    from cwac_lab.run.artefacts import artefacts
    from cwac_lab.run.start import start

    screen = Screen()
    begin = start(run, screen.say)
    model, chat = begin.load(run)
    context, facts = artefacts(run, begin, model, chat, screen.say)
    screen.say(f"start: {begin.folder.description}")
    if "reference" in facts:
        held = facts["reference"]
        screen.say(f"reference: {held['kept']} of {held['asked']} harmful prompts, {held['benign']} benign ones")
        for name, kept in held.get("forms", {}).items():
            screen.say(f"in the form {name}: {kept} of {held['asked']} harmful prompts")
    if context.subspace is not None:
        ranks = sorted(basis.shape[1] for basis in context.subspace.bases.values())
        screen.say(f"subspace {facts['subspace']['folder']}: rank {ranks[0]} to {ranks[-1]} over {len(ranks)} sites")
        for name, share in _covered(run, begin, context, facts, chat):
            screen.say(f"inputs within the subspace, {name}: {share:.4f}")
    for features in context.features:
        quality = facts["features"][f"layer{features.layer}"]["quality"]
        screen.say(
            f"autoencoder of layer {features.layer}: {quality['explained_variance']:.2f} of the held-out variance "
            f"explained, L0 {quality['l0']:.0f}, {quality['dead_share']:.0%} dead; "
            f"{len(features.latents)} safety latents chosen"
        )


if __name__ == "__main__":
    cli.launch(main)
