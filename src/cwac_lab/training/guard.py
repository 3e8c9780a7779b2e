"""A guard on a model that is trained: where its refusals begin to go, training ends, goes back, or is mended."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L

from cwac_lab.core import distributed
from cwac_lab.core.cache import read_json, reading, write_json
from cwac_lab.core.errors import Diverged
from cwac_lab.data.batches import in_place_of
from cwac_lab.defenses.interface import settled
from cwac_lab.models.answers import Batch
from cwac_lab.models.chat import Encoded
from cwac_lab.training.checkpoint import Resume, save
from cwac_lab.training.settings import GuardConfig

# Files in the guard's folder: what it saw, and the state at the last look that was within.
LOOKS, WITHIN = "looks.json", "within"


class Guard(L.Callback):
    """Looks at the divergence from the start every so many steps, and acts where it is too large (``GuardConfig``)."""

    def __init__(
        self, config: GuardConfig, look: Callable[[Any], float], refusals: Sequence[Encoded], pad_id: int, seed: int,
        folder: Path,
    ) -> None:  # fmt: skip
        """Take what is looked at, and where state is kept until the end.

        Args:
            config: Settings, with a limit.
            look: Returns the divergence of a model, which it leaves as it is.
            refusals: Rows of a replay.
            pad_id: Id to pad with.
            seed: Of the order of these rows.
            folder: Folder of what a resumed run goes on with; who owns the run removes it at the end.
        """
        assert config.kl is not None
        self._config, self._limit, self._look = config, config.kl, look
        self.refusals, self._pad_id, self._seed, self._folder = refusals, pad_id, seed, folder
        self._looks: list[dict[str, Any]] = []
        self._seen = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Take up what a resumed run has seen; of a new one the start is within."""
        self._seen = pl_module.step
        pl_module.rows = self._rows
        if not self._seen:
            self._keep(pl_module)
            return
        self._looks = [each for each in self._kept() if each["step"] <= self._seen]
        if self._looks and self._looks[-1].get("did") in ("stop", "rollback"):  # it was stopped after that
            trainer.should_stop = True
            if "to" in self._looks[-1]:
                self._go_back(pl_module)

    def _kept(self) -> list[dict[str, Any]]:
        """Return the looks that are written down."""
        if not (self._folder / LOOKS).is_file():
            return []
        with reading(self._folder):
            return list(read_json(self._folder / LOOKS))

    def _go_back(self, module: Any) -> int:
        """Put the state of the last look that was within back, and return its step."""
        kept = Resume(self._folder / WITHIN)
        kept.weights(module.model, module.defense)
        return kept.step

    def _keep(self, module: Any) -> None:
        if self._config.do == "rollback":
            save(self._folder / WITHIN, module, "guard")

    def _rows(self, step: int, batch: Batch) -> Batch:
        """Return refusals in the place of a step's rows while a replay lasts."""
        began = [each["step"] for each in self._looks if each.get("did") == "replay"]
        if not began or step >= began[-1] + self._config.replay_steps:
            return batch
        return in_place_of(batch, self.refusals, step, f"guard/{self._seed}", self._pad_id)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        """Look, where a step has just ended that is to be looked at."""
        step, last = pl_module.step, pl_module.step == pl_module.total_steps
        if step == self._seen:
            return
        self._seen = step
        if step % self._config.every_n_steps and not last:
            pl_module.log_figures("guard", {})
            return
        with settled(pl_module.defense, pl_module.model):  # as the weights are used
            found = distributed.told(self._look(pl_module.model))  # one value, so that all do the same
        if not math.isfinite(found):
            raise Diverged(f"the divergence from the start is not finite after step {step}")
        self._looks.append({"step": step, "kl": found, **self._act(trainer, pl_module, found, last=last)})
        if distributed.rank() == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_json(self._folder / LOOKS, self._looks)
        pl_module.log_figures("guard", {"guard/kl": found})

    def _act(self, trainer: L.Trainer, module: Any, found: float, *, last: bool) -> dict[str, Any]:
        """Do what is to be done, and return what was."""
        if found <= self._limit:
            self._keep(module)
            return {}
        if self._config.do == "replay":
            return {} if last else {"did": "replay"}
        trainer.should_stop = True
        if self._config.do == "rollback":
            return {"did": "rollback", "to": self._go_back(module)}
        return {} if last else {"did": "stop"}

    def facts(self) -> dict[str, Any]:
        """Return what a record has of the guard."""
        self._looks = self._looks or self._kept()  # nothing was left to train in a resumed run
        did = [each for each in self._looks if "did" in each]
        return {
            "kl": self._looks[-1]["kl"] if self._looks else None,
            "looks": [[each["step"], each["kl"]] for each in self._looks],
            "replays": sum(each["did"] == "replay" for each in did),
            "ended": next((each["step"] for each in did if each["did"] != "replay"), None),
            "rolled_back_to": next((each["to"] for each in did if "to" in each), None),
        }
