"""What every artefact depends on, in one list; keys are made from it alone.

``RECIPES`` are kept in ``cache_root`` by their key. What is kept elsewhere:

* A run (``run.identity``): all settings but ``config.run.ALIKE``, classes by name, and the content of weights, task
  rows, pools, the attack's own rows and the modules of a user's own classes. It has no number: its provenance names the
  commit of the code, and a record stays what it was.
* Verdicts of a run: answers, task, and the ``version`` of the judge, which ``metrics.json`` tells.
* What a start computes on the prompts of diagnostics (``run.identity.probe_key``), kept while the process lives.

Batch sizes, devices and the number of processes change rounding only, and are in no key of an artefact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """How one kind of artefact is made.

    Attributes:
        kind: Its folder in ``cache_root``.
        number: Part of the key; raised when the code makes something else of the same inputs, so that nothing that the
            code of before made is taken for it. A test holds it beside a digest of ``code``.
        inputs: What goes in, as parts of the key.
        code: What makes it, as ``module`` or ``module:name`` within this package.
    """

    kind: str
    number: int
    inputs: tuple[str, ...]
    code: tuple[str, ...]

    def key(self, **inputs: Any) -> dict[str, Any]:
        """Return the key of an artefact of these inputs, JSON-able values all.

        Raises:
            TypeError: If they are not those that are declared.
        """
        if inputs.keys() != set(self.inputs):
            raise TypeError(f"{self.kind} is made of {sorted(self.inputs)}, not of {sorted(inputs)}")
        return {"recipe": self.number, **inputs}


def _of(module: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{module}:{name}" for name in names)


_FORWARD = ("data.batches:pad", "models.prefix:states_after", "models.prefix:opening_cache", "models.capture")
_ANSWERING = ("evaluation.generate", "models.chat:ChatFormat", "models.prefix:opening_cache")

# Weights of a package of the Python index, as a folder of transformers.
PACKAGE = Recipe("models", 1, ("package", "version", "architecture"), ("models.packaged", "models.pieces"))
ALIGNED = Recipe(
    "aligned",
    6,
    (
        *("judge", "start", "end", "prompts", "refusals", "answer_tokens", "trainer", "factors", "chat_template"),
        "measured_on",
    ),
    (
        *("run.alignment", "run.distillation", "models.shipped", "models.adapters:attach", "training.loop:fit"),
        *("training.module", "models.answers", "data.batches", "defenses.literature.start", *_ANSWERING),
    ),
)
# The start that travels with the package, merged. ``adapter`` is its content.
START = Recipe(
    "start",
    2,
    ("start", "adapter"),
    (
        *_of("run.alignment", "_merge", "_shipped"),
        *_of("models.lora", "add", "scale", "_of", "Place", "_place"),
        *_of("models.sites", "lefts", "rights"),
    ),
)
# An adapter of a user's own merged into its base, with the tokenizer of one of them, ``words``.
MERGED = Recipe(
    "merged",
    1,
    ("base", "adapter", "words"),
    ("models.loading:_given", "models.folder:copy_words", "models.lora", *_of("models.sites", "lefts", "rights")),
)
# The start's own answers to reference prompts.
ANSWERS = Recipe("answers", 1, ("model", "dtype", "prompts", "tokens", "end"), ("run.references:_answers", *_ANSWERING))
# The same to the harmful prompts of an evaluation. ``opening`` is what an attack makes answers begin with.
START_ANSWERS = Recipe(
    "start_answers",
    1,
    ("model", "dtype", "prompts", "opening", "tokens", "end", "engine"),
    ("run.start_answers:start_answers", "evaluation.protocol:answered", "evaluation.engines", *_ANSWERING),
)
# How far a model is from another, ``before`` (``python -m cwac_lab.compare``).
DRIFT = Recipe(
    "drift",
    1,
    ("before", "after", "dtype", "prompts", "templates"),
    ("run.apart", "diagnostics.alike", "diagnostics.stream:divergences", "models.answers", "data.batches:collate"),
)
# The start's loss on each document of plain text; ``texts`` are their token ids.
START_TEXT = Recipe(
    "start_text",
    2,
    ("model", "dtype", "texts"),
    (
        *("run.ability:start_losses", "evaluation.plain:losses", "models.answers:answer_logits"),
        *_of("evaluation.heldout", "summed", "_parts", "_sums"),
    ),
)
SUBSPACE = Recipe(
    "subspace",
    3,
    ("model", "dtype", "prompts", "spec"),
    (
        *_of("defenses.cwac.subspace.basis", "leading", "build", "subspace_of", "drawn", "_Weighed", "_beside"),
        *("defenses.cwac.subspace.reading", "defenses.cwac.subspace.spec", "defenses.cwac.subspace.span:Span.of"),
        *("run.protected:texts", "core.linalg:complement"),
        *("defenses.cwac.subspace.parts", "defenses.cwac.subspace.solvers", "models.capture", "data.batches:pad"),
        *_of("models.sites", "linears", "_of_experts", "SCOPES", "PROJECTIONS", "JOINED", "OF_EXPERTS", "paths_in"),
        *_of("core.linalg", "leading_eigenbasis", "leading_directions", "range_finder", "OVERSAMPLING"),
        *_of("core.linalg", "_rank", "reaching", "_support", "_shares"),
    ),
)
# How much of the inputs of prompts that nothing was built from lies in a ``subspace``, which is named by its key.
HELD_SHARE = Recipe(
    "held_share",
    1,
    ("subspace", "prompts"),
    (
        *("defenses.cwac.subspace.reading", "defenses.cwac.subspace.parts", "models.capture"),
        *_of("defenses.cwac.subspace.coverage", "covered", "_shares", "_Share"),
        "defenses.cwac.subspace.span:Span.squares",
    ),
)
# ``library`` is the version of sae-lens, which trains it.
AUTOENCODER = Recipe(
    "sae",
    2,
    ("model", "dtype", "layer", "texts", "settings", "library"),
    (
        "run.artefacts:_Workshop.autoencoder",
        *_of("defenses.cwac.sae.activations", "collect", "Contexts", "split"),
        *_of("defenses.cwac.sae.train", "train", "_settings", "_endless"),
        *_FORWARD,
    ),
)
# ``openings`` are the first tokens of refusals, where attribution scores by them. Settings and seed of the autoencoders
# are in their names.
LATENTS = Recipe(
    "features",
    2,
    ("model", "dtype", "autoencoders", "prompts", "openings", "spec"),
    (
        *("run.artefacts:_Workshop._choose", "defenses.cwac.sae.latents"),
        *_of("defenses.cwac.sae.train", "encoder", "decoder_directions"),
        *_FORWARD,
    ),
)
_ALL = (
    *(PACKAGE, ALIGNED, START, MERGED, ANSWERS, START_ANSWERS, START_TEXT, DRIFT),
    *(SUBSPACE, HELD_SHARE, AUTOENCODER, LATENTS),
)
RECIPES = {recipe.kind: recipe for recipe in _ALL}
