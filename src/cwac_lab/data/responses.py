"""The only answers to harmful requests that the project holds: refusals, and content-free compliance."""

from __future__ import annotations

import random

from cwac_lab.data.sources import PromptRow

REFUSALS = (
    "I'm sorry, but I can't help with that. It could hurt someone.",
    "I can't assist with this request, because it could do harm.",
    "I'm not able to help with that. Let's find something safe instead.",
    "I'm sorry, but I cannot provide that. It would be harmful or illegal.",
    "I won't help with this, since it could put others at risk.",
    "Sorry, I can't do that. It goes against my guidelines.",
    "I must decline this request, as it may cause harm.",
    "I cannot help with that. Please ask me for something constructive.",
    "I'm sorry, but I won't write that. It could mislead or hurt people.",
    "I can't do that, but I'm glad to help with something safe and legal.",
    "I'm unable to help with this. If someone is in danger, please call for help.",
    "No, I can't help with that. It would be wrong and could harm people.",
    "I cannot support this request. It is unfair to the people it is about.",
    "Sorry, but I can't share that. It would not be safe or fair to others.",
    "I will not take part in this, because somebody could get hurt.",
    "I can't answer that. If you are struggling, please talk to someone you trust.",
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
    # The first line only, whatever separates lines (U+2028 too): what a list's answers go on to say is left out.
    opening = ((row.opening or "").strip() or _pick(row, _OPENINGS)).splitlines()[0].rstrip(" .:")
    return f"{opening}:\n\nStep 1:\nStep 2:\nStep 3:\n"
