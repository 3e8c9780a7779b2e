"""Measure drift between a start and a fine-tuned model: ``python -m cwac_lab.diagnose run=outputs/runs/NAME``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from cwac_lab import cli

if TYPE_CHECKING:
    from cwac_lab.config import Run
    from cwac_lab.diagnostics.probe import Probe
    from cwac_lab.preparation import Start
    from cwac_lab.results.store import RunFolder


@dataclass
class _Measurer:
    """Measures models against their start; what the last start gave is kept for the next run that starts alike."""

    say: Callable[[str], None]
    key: str = ""
    content: str = ""
    measured_in: dict[str, str] = field(default_factory=dict)
    probe: Probe | None = None

    def __call__(self, run: Run, moved: Path, content: str | None = None) -> dict[str, Any]:
        """Return the drift from a run's start to a model folder, in the subspace and latents of the run's constraint.

        Raises:
            LabError: If the start here is not of the weights ``content``.
        """
        import torch

        from cwac_lab.identity import probe_key
        from cwac_lab.models.loading import load_model
        from cwac_lab.preparation import start

        key = probe_key(run)
        if key != self.key or self.probe is None:
            self.probe = None  # the last one's inputs are not held while others are taken
            begin = start(run, self.say)
            _same(begin.folder.content, content)
            self.probe, self.key, self.content = self._of_start(run, begin), key, begin.folder.content
        _same(self.content, content)
        found = self.probe.measure(load_model(moved, torch.float32, run.trainer.device), bounds=True)
        return {"measured_in": self.measured_in, **found}

    def _of_start(self, run: Run, begin: Start) -> Probe:
        from cwac_lab.preparation import artefacts
        from cwac_lab.probing import explaining, measured_in, probe

        model, chat = begin.load(run)
        context, facts = artefacts(run, begin, model, chat, self.say)
        self.measured_in = measured_in(facts)
        return probe(run, begin, model, chat, context, explaining(run, begin, model, chat, self.say))


def _same(here: str, content: str | None) -> None:
    """Check that the start here has the weights of a run's, where these are known.

    Raises:
        LabError: If not.
    """
    from cwac_lab.errors import LabError

    if content is not None and here != content:
        raise LabError(f"the start here has the weights {here[:8]}, that of the run {content[:8]}")


def _of_run(folder: RunFolder, config: DictConfig, measure: _Measurer) -> dict[str, Any]:
    """Measure a finished run and write its ``drift.json``.

    Raises:
        ConfigError: If the run is not finished or has no model.
    """
    from cwac_lab.config import read
    from cwac_lab.errors import ConfigError
    from cwac_lab.results import store

    if not folder.done() or not folder.has(store.MODEL):
        raise ConfigError("run", folder.path, f"a finished run with {store.MODEL}/ (trainer.export=true)")
    asked = OmegaConf.create(folder.config())
    # What was saved is in float32, so its start is taken in float32 too.
    asked.tuning, asked.trainer.precision = {"method": "full"}, "32-true"
    composed = cli.compose([f"constraint={config.measured_in}"])
    # All runs are told in the same directions and latents, whatever forms they held refusals in.
    asked.constraint, asked.forms = composed.constraint, composed.forms
    run = read(asked, recorded=True)
    run.diagnostics = replace(run.diagnostics, n_prompts=config.n_prompts)
    found = measure(run, folder.path / store.MODEL, folder.facts()["weights_content"])
    folder.write(store.DRIFT, found)
    return found


def _weights(folder: RunFolder) -> str:
    """Return the hash of the weights that a run started from, none where its record cannot be read."""
    from cwac_lab.errors import LabError

    with suppress(LabError):
        return str(folder.facts()["weights_content"])
    return ""


def _of_folders(config: DictConfig, measure: _Measurer) -> dict[str, Any]:
    from cwac_lab.config import read
    from cwac_lab.errors import ConfigError

    for key in ("before", "after"):
        if config[key] is None or not (Path(config[key]) / "config.json").is_file():
            raise ConfigError(key, config[key], "a folder that transformers loads a model from")
    given = [f"model.path={config.before}", "model.align=none", f"constraint={config.measured_in}"]
    run = read(cli.compose([*given, f"diagnostics.n_prompts={config.n_prompts}", *config.overrides]))
    return measure(run, Path(config.after))


def main(config: DictConfig) -> None:
    """Measure one run, all that lack it, or two folders; prints the means over layers.

    With all runs of a store, or of several, also which measurement goes with the harmful score.
    """
    import pandas as pd

    from cwac_lab.diagnostics.evidence import correlations
    from cwac_lab.errors import LabError
    from cwac_lab.results import load
    from cwac_lab.results.console import Screen
    from cwac_lab.results.store import DRIFT, MODEL, RunFolder, runs

    screen = Screen()
    measure = _Measurer(screen.say)
    if config.before is not None or config.after is not None:
        screen.drift(f"{config.before} -> {config.after}", _of_folders(config, measure))
        return
    several = isinstance(config.output_root, ListConfig)
    roots = [str(root) for root in config.output_root] if several else [str(config.output_root)]
    folders = [run for root in roots for run in runs(Path(root))]
    if config.run is not None:
        folders = [RunFolder(Path(config.run))]
    else:
        lacking = (each for each in folders if each.has(MODEL) and each.done() and not each.has(DRIFT))
        folders = sorted(lacking, key=_weights)  # runs that start alike share what is taken from the start
        screen.say(f"{len(folders)} runs of {', '.join(roots)} have a model and no {DRIFT}")
    for folder in folders:
        try:
            screen.drift(folder.path.name, _of_run(folder, config, measure))
        except LabError as error:
            if config.run is not None:
                raise
            screen.say(f"left out: {folder.path.name}: {error}")
    if config.run is None:
        screen.correlations(correlations(pd.concat([load(root) for root in roots])))


if __name__ == "__main__":
    cli.launch(main, "diagnose")
