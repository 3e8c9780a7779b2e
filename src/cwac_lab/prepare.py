"""Build and cache what a constraint needs: ``python -m cwac_lab.prepare model=qwen constraint=coupled``."""

from __future__ import annotations

from omegaconf import DictConfig

from cwac_lab import cli


def main(config: DictConfig) -> None:
    """Align where needed, then build subspace, autoencoder and latents."""
    from cwac_lab.config import read
    from cwac_lab.preparation import artefacts, start
    from cwac_lab.results.console import Screen

    screen, run = Screen(), read(config)
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
    for features in context.features:
        quality = facts["features"][f"layer{features.layer}"]["quality"]
        screen.say(
            f"autoencoder of layer {features.layer}: {quality['explained_variance']:.2f} of the held-out variance "
            f"explained, L0 {quality['l0']:.0f}, {quality['dead_share']:.0%} dead; "
            f"{len(features.latents)} safety latents chosen"
        )


if __name__ == "__main__":
    cli.launch(main)
