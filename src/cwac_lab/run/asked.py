"""What may be asked of a finished run: outside its key, read by tables, and made afterwards where that can be."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf

from cwac_lab.results import store
from cwac_lab.results.store import RunFolder

# Each with its details.
ASKED: dict[str, tuple[str, ...]] = {
    "suites": (),
    "diagnostics.enabled": ("diagnostics.every_n_steps",),
    "evaluation.every_n_steps": (),
    "evaluation.perplexity": ("evaluation.plain_text",),
    "evaluation.lm_eval": ("evaluation.lm_eval_limit",),
}
# A detail that says "none of it": with any other in a record, there is more than was asked for.
_NOT_ASKED = (0, False)


def _plain(node: Any) -> Any:
    return OmegaConf.to_container(node) if OmegaConf.is_config(node) else node


def asks(settings: dict[str, Any]) -> dict[str, Any]:
    """Return what of ``ASKED`` settings ask for, with the details of each."""
    found = OmegaConf.create(settings)
    asked = {key: (key, *more) for key, more in ASKED.items() if OmegaConf.select(found, key)}
    return {each: _plain(OmegaConf.select(found, each)) for keys in asked.values() for each in keys}


def answered(asked: dict[str, Any], folder: RunFolder) -> bool:
    """Tell whether a finished run was asked all that by what its record says.

    Of named suites it may have more, and who judges them is asked when a run is made.
    """
    made = OmegaConf.create(folder.config())
    return all(_holds(_plain(OmegaConf.select(made, key)), value) for key, value in asked.items())


def _holds(made: Any, value: Any) -> bool:
    if isinstance(value, dict):
        there = made if isinstance(made, dict) else {}
        return all(_prompts(there.get(name)) == _prompts(each) for name, each in value.items())
    return bool(made == value) or value in _NOT_ASKED


def _prompts(suite: Any) -> Any:
    return {name: value for name, value in suite.items() if name != "judge"} if isinstance(suite, dict) else suite


def note(settings: dict[str, Any], folder: RunFolder) -> None:
    """Write into the record of a run that it has what settings ask for, but for suites, which are noted when asked."""
    made, changed = OmegaConf.create(folder.config()), False
    for key, value in asks(settings).items():
        if key != "suites" and not _holds(_plain(OmegaConf.select(made, key)), value):
            OmegaConf.update(made, key, value, merge=False)
            changed = True
    if changed:
        folder.write(store.CONFIG, OmegaConf.to_container(made))
