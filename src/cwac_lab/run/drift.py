"""Measure a run: its held-out prompts, its start, and the subspace and latents that drift is told in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from cwac_lab.config.run import Run, read
from cwac_lab.core.cache import shortened
from cwac_lab.core.cli import compose
from cwac_lab.core.errors import ConfigError, LabError
from cwac_lab.core.outputs import writable
from cwac_lab.core.overrides import text
from cwac_lab.defenses.cwac.sae import train as sae_train
from cwac_lab.defenses.interface import Context
from cwac_lab.diagnostics.alike import check_alike
from cwac_lab.diagnostics.probe import Probe
from cwac_lab.diagnostics.stream import Explains
from cwac_lab.evaluation.generate import answers
from cwac_lab.models.adapters import TuningConfig
from cwac_lab.models.chat import ChatFormat, Encoded
from cwac_lab.models.loading import load_model
from cwac_lab.results import store
from cwac_lab.results.store import RunFolder
from cwac_lab.run.artefacts import artefacts, autoencoders
from cwac_lab.run.identity import probe_key
from cwac_lab.run.start import Start, start

# The pools that drift is measured on: no constraint has seen them, and the task does not train on them.
POOLS = {"harmful": "harmful", "benign": "harmless"}
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
    rows = {kind: begin.pools.get(pool, split)[:most] for kind, pool in POOLS.items()}
    for kind, held in rows.items():
        if len(held) < 2:
            raise ConfigError(f"data.{POOLS[kind]}.{split}", len(held), ">= 2 prompts to measure drift on")
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


@dataclass
class Measurer:
    """Measures models against their start; what the last start gave is kept for the next run that starts alike."""

    say: Callable[[str], None]
    key: str = ""
    content: str = ""
    measured_in: dict[str, str] = field(default_factory=dict)
    probe: Probe | None = None

    def __call__(self, run: Run, moved: Path, content: str | None = None) -> dict[str, Any]:
        """Return the drift from a run's start to a model folder, in the subspace and latents of the run's constraint.

        Raises:
            LabError: If the start here is not of the weights ``content``, or the model computes no finite numbers.
        """
        key = probe_key(run)
        if key != self.key or self.probe is None:
            self.probe = None  # the last one's inputs are not held while others are taken
            begin = start(_measured(run), self.say)
            _same(begin.folder.content, content)
            self.probe, self.key, self.content = self._of_start(run, begin), key, begin.folder.content
        _same(self.content, content)
        found = self.probe.measure(load_model(moved, torch.float32, run.trainer.device), bounds=True)
        return {"measured_in": self.measured_in, **found}

    def of_run(self, folder: RunFolder, settings: dict[str, Any]) -> dict[str, Any]:
        """Measure the model of a finished run and write its ``drift.json``.

        Args:
            folder: The run.
            settings: Its resolved configuration, with the constraint that drift is told in.

        Raises:
            LabError: If its start is not here, or its folder cannot be written to.
        """
        writable("run", folder.path)
        asked = OmegaConf.create(settings)
        # What was saved is in float32, so its start is taken in float32 too.
        asked.tuning, asked.trainer.precision = {"method": "full"}, "32-true"
        found = self(read(asked, recorded=True), folder.path / store.MODEL, folder.facts()["weights_content"])
        folder.write(store.DRIFT, found)
        return found

    def _of_start(self, run: Run, begin: Start) -> Probe:
        model, chat = begin.load(run)
        context, facts = artefacts(run, begin, model, chat, self.say)
        self.measured_in = measured_in(facts)
        return probe(run, begin, model, chat, context, explaining(run, begin, model, chat, self.say))


def _measured(run: Run) -> Run:
    """Return a run whose start is asked for all that a measurement of drift needs."""
    return replace(run, diagnostics=replace(run.diagnostics, enabled=True))


def _same(here: str, content: str | None) -> None:
    """Check that the start here has the weights of a run's, where these are known.

    Raises:
        LabError: If not.
    """
    if content is not None and here != content:
        raise LabError(f"the start here has the weights {shortened(here)}, that of the run {shortened(content)}")


def _explained(autoencoder: Any, x: Float[Tensor, "N D"]) -> float:
    return sae_train.quality(autoencoder, x)["explained_variance"]


def of_run(folder: RunFolder, asked: DictConfig, measure: Measurer) -> dict[str, Any]:
    """Measure the model of a finished run and write its ``drift.json``.

    Args:
        folder: The run.
        asked: What is measured: ``measured_in`` (a constraint) and ``n_prompts``.
        measure: Measures it.

    Raises:
        ConfigError: If the run is not finished or has no model.
    """
    if not folder.done() or not folder.has(store.MODEL):
        raise ConfigError("run", folder.path, f"a finished run with {store.MODEL}/ (trainer.export=true)")
    settings = folder.config()
    # All runs are told in the same directions and latents, whatever forms they held refusals in.
    composed = compose([f"constraint={asked.measured_in}"])
    settings |= {group: OmegaConf.to_container(composed[group], resolve=True) for group in ("constraint", "forms")}
    settings["diagnostics"] = {"n_prompts": asked.n_prompts}
    return measure.of_run(folder, settings)


def of_folders(asked: DictConfig, measure: Measurer) -> dict[str, Any]:
    """Measure one model folder, ``asked.after``, against another, ``asked.before``.

    Raises:
        ConfigError: If they cannot be compared.
    """
    for key in ("before", "after"):
        if asked[key] is None or not (Path(asked[key]) / "config.json").is_file():
            raise ConfigError(key, asked[key], "a folder that transformers loads a model from")
    given = [text("model.path", asked.before), "model.align=none", f"constraint={asked.measured_in}"]
    run = read(compose([*given, f"diagnostics.n_prompts={asked.n_prompts}", *asked.overrides]))
    run.tuning, run.trainer = TuningConfig(), replace(run.trainer, precision="32-true")  # as the other one is loaded
    for words in check_alike(Path(asked.before), Path(asked.after)):
        measure.say(words)
    return measure(run, Path(asked.after))


def lacking(roots: Sequence[str]) -> list[RunFolder]:
    """Return the finished runs of stores that have a model and no ``drift.json``.

    Those that start alike stand together: they share what is taken from the start.
    """
    folders = [run for root in roots for run in store.folders(Path(root))]
    found = (each for each in folders if each.has(store.MODEL) and not each.has(store.DRIFT) and _done(each))
    return sorted(found, key=_weights)


def _done(folder: RunFolder) -> bool:
    """Tell whether a run is finished; one whose record cannot be read is not."""
    with suppress(LabError):
        return folder.done()
    return False


def _weights(folder: RunFolder) -> str:
    """Return the hash of the weights that a run started from, none where its record cannot be read."""
    with suppress(LabError):
        return str(folder.facts()["weights_content"])
    return ""
