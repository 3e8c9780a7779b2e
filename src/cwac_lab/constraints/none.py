"""Plain supervised fine-tuning: the undefended line."""

from __future__ import annotations

from dataclasses import dataclass

from cwac_lab.defense import Defense


@dataclass
class NoConstraint(Defense):
    """Does nothing."""
