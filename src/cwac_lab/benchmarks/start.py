"""How good an aligned start is: what it refuses of kinds that alignment never saw, and what it keeps.

``python -m cwac_lab.benchmarks.start data.root=FOLDER`` asks the original model and the start the test pools, and the
public sets that lie in FOLDER; sets that are not there are left out, with a line. It writes ``rates.json`` into
``align.export``, or else ``output_root``. Another model is measured by ``model.path=FOLDER model.align=none``.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from cwac_lab.core import cli
from cwac_lab.core.cache import write_json
from cwac_lab.core.errors import MissingAsset
from cwac_lab.data.batches import collate
from cwac_lab.data.pools import Pools
from cwac_lab.data.reading import find_file
from cwac_lab.data.sources import PromptRow, Prompts, load_prompts
from cwac_lab.evaluation.sets import TOKENS, PromptSet, judge, rates
from cwac_lab.models.answers import answer_loss, to_device
from cwac_lab.models.chat import Encoded

FILE = "rates.json"
# Ordinary instructions of a public list that are asked; of each kind those that perplexity is measured on.
INSTRUCTIONS, HELD_OUT = 200, 100
# Public sets: name, kind, file under ``data.root``, rows that count, which of them (every second one from 0 or 1).
# Recipes were compared on ``HarmBench`` and the first half of XSTest.
PUBLIC: tuple[tuple[str, str, str, dict[str, Any], slice], ...] = (
    ("HarmBench validation", "harmful", "harmful/validation", {}, slice(None)),
    ("XSTest unsafe, half A", "harmful", "xstest/prompts", {"safe": False}, slice(0, None, 2)),
    ("XSTest unsafe, half B", "harmful", "xstest/prompts", {"safe": False}, slice(1, None, 2)),
    ("MaliciousInstruct", "harmful", "harmful/reference", {"source": "malicious_instruct"}, slice(None)),
    ("TDC 2023", "harmful", "harmful/reference", {"source": "tdc2023"}, slice(None)),
    ("AdvBench", "harmful", "harmful/reference", {"source": "advbench"}, slice(None)),
    ("XSTest safe, half A", "lookalike", "xstest/prompts", {"safe": True}, slice(0, None, 2)),
    ("XSTest safe, half B", "lookalike", "xstest/prompts", {"safe": True}, slice(1, None, 2)),
)


def instructions(root: Path) -> list[PromptRow]:
    """Return the public instructions that are asked, drawn by a fixed seed.

    Raises:
        MissingAsset: If there are none.
    """
    held = load_prompts("local", Prompts("harmless/instructions"), root)
    return random.Random(0).sample(held, min(INSTRUCTIONS, len(held)))


def public_sets(root: Path | None, say: Callable[[str], None]) -> list[PromptSet]:
    """Return the public sets that lie in a folder; a line tells of each that does not."""
    found = []
    for name, kind, file, where, part in PUBLIC:
        if there(root, file):
            assert root is not None
            found.append(PromptSet(name, kind, load_prompts("local", Prompts(file, where=where), root)[part]))
        else:
            say(f"{name}: left out, no {file} under data.root={root}")
    if there(root, "harmless/instructions"):
        assert root is not None
        found.append(PromptSet("Alpaca instructions", "harmless", instructions(root)))
    else:
        say(f"Alpaca instructions: left out, no harmless/instructions under data.root={root}")
    return found


def there(root: Path | None, file: str) -> bool:
    """Tell whether a folder has a list."""
    try:
        return root is not None and find_file(root, file).is_file()
    except MissingAsset:
        return False


def pool_sets(pools: Pools) -> list[PromptSet]:
    """Return the test pools of a run's data."""
    kinds = {"harmful": "own harmful", "harmless": "own harmless", "lookalike": "own look-alikes"}
    return [PromptSet(f"{words}, test pool", kind, pools.get(kind, "test")) for kind, words in kinds.items()]


@torch.inference_mode()
def perplexity(model: Any, examples: Sequence[Encoded], pad_id: int) -> float:
    """Return a model's perplexity per token on answers."""
    total = count = 0.0
    for example in examples:
        tokens = sum(label >= 0 for label in example.labels)
        total += tokens * float(answer_loss(model, to_device(collate([example], pad_id), model.device)))
        count += tokens
    return math.exp(total / count)


def main(config: DictConfig) -> None:
    """Measure, print a table, write the file."""
    from cwac_lab.config.run import read
    from cwac_lab.models.loading import find, load_chat, load_model
    from cwac_lab.models.shipped import adapter_digest
    from cwac_lab.report.console import Screen
    from cwac_lab.run.alignment import adapter_of, own_answers
    from cwac_lab.run.start import start

    screen, run = Screen(), read(config)
    begin = start(run, screen.say)
    root = Path(run.data.root) if run.data.root is not None else None
    sets = [*pool_sets(begin.pools), *public_sets(root, screen.say)]
    first = begin.before or find(
        replace(run.model, path=None, revision=None, adapter=None), run.profile.name, Path(run.cache_root)
    )
    chat, original = load_chat(first.path, run.trainer.max_length), load_model(first.path, device=run.trainer.device)
    asked = [row for each in sets if each.kind == "harmless" for row in each.rows[:HELD_OUT]]
    answers = own_answers(original, chat, asked, run)
    before = perplexity(original, answers, chat.pad_id)
    report: dict[str, Any] = {
        "judge": judge(), "answer_tokens": TOKENS, "perplexity_on": f"{len(answers)} own answers of the original",
        "adapter": adapter_digest(adapter_of(begin.folder.path)) if begin.before is not None else None, "models": {},
    }  # fmt: skip
    for folder in [each for each in (begin.before, begin.folder) if each is not None]:
        screen.say(f"{folder.description}: {sum(len(each.rows) for each in sets)} prompts")
        model = original if folder == first else load_model(folder.path, device=run.trainer.device)
        asking = load_chat(folder.path, run.trainer.max_length, run.model.chat_template)
        told: dict[str, Any] = {
            "content": folder.content,
            "sets": rates(model, asking, sets, run.task, run.evaluation.batch_size),
        }
        if asking.tokenizer.get_vocab() == chat.tokenizer.get_vocab():
            told["perplexity_ratio"] = round(perplexity(model, answers, chat.pad_id) / before, 4)
        else:
            screen.say("perplexity: left out, as this model has other tokens than the packaged one")
        report["models"][folder.description] = told
    screen.rates(report)
    target = Path(run.align.export or run.output_root) / FILE
    write_json(target, report)
    screen.say(f"written: {target}")


if __name__ == "__main__":
    cli.launch(main)
