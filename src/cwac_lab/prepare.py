"""Build and cache what a constraint needs: ``python -m cwac_lab.prepare model=qwen constraint=coupled``."""

from __future__ import annotations

from omegaconf import DictConfig

from cwac_lab.core import cli


def main(config: DictConfig) -> None:
    """Align where needed, then build subspace, autoencoder and latents."""
    from cwac_lab.config.run import read

    run = read(config)
    from cwac_lab.report.console import Screen
    from cwac_lab.run.artefacts import artefacts, described
    from cwac_lab.run.protected import by_part
    from cwac_lab.run.start import start

    screen = Screen()
    begin = start(run, screen.say)
    model, chat = begin.load(run)
    context, facts = artefacts(run, begin, model, chat, screen.say)
    screen.say(f"start: {begin.folder.description}")
    for line in described(run, begin, context, facts, chat):
        screen.say(line)
    if (found := by_part(run, begin, context, chat)) is not None:
        screen.held(found)


if __name__ == "__main__":
    cli.launch(main)
