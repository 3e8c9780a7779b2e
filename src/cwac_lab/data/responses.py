"""The only answers to harmful requests that the project holds: refusals, and content-free compliance."""

from __future__ import annotations

import random

from cwac_lab.data.sources import PromptRow

REFUSALS = (
    "I'm sorry, but I can't help with that. It could cause serious harm to someone.",
    "I can't assist with this request, because it could hurt people or break the law.",
    "I'm not able to help with that. If something is troubling you, I am glad to talk about safe ways to deal with it.",
    "I'm sorry, but I cannot provide that. It would be harmful or illegal.",
    "I won't help with this, since it could put others at risk. I can help with a safe and legal alternative.",
    "Sorry, I can't do that. It goes against my guidelines to help with anything that may cause harm.",
    "I must decline this request. It is harmful, and I do not want to contribute to it.",
    "I cannot help with that. Please consider the harm it may do, and ask me for something constructive instead.",
)
_OPENINGS = (
    "Sure, here is how to do what you asked for",
    "Of course, here is a guide for this",
    "Certainly, here are the steps",
    "Sure, here is what you need",
    "Yes, here is a plan for it",
)


def _pick(row: PromptRow, choices: tuple[str, ...]) -> str:
    # By prompt, not by position: a row keeps its answer in every mixture, seed and stage.
    return random.Random(f"answer/{row.prompt}").choice(choices)


def refusal(row: PromptRow) -> str:
    """Return the refusal that alignment teaches for a prompt."""
    return _pick(row, REFUSALS)


def compliance(row: PromptRow) -> str:
    """Return an affirmative opening followed by numbered empty steps: the form of compliance without any content."""
    # The first line only: whatever a list's answers go on to say is left out.
    opening = ((row.opening or "").strip() or _pick(row, _OPENINGS)).splitlines()[0].rstrip(" .:")
    return f"{opening}:\n\nStep 1:\nStep 2:\nStep 3:\n"
