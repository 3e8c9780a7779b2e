"""Coupled constraint (CWAC): the weight and the activation constraint at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from cwac_lab.constraints.activation import ActivationConstraint
from cwac_lab.constraints.weight import WeightConstraint
from cwac_lab.defense import Composite


@dataclass
class CoupledConstraint(Composite):
    """Both parts, each configured on its own under its field."""

    weight: WeightConstraint = field(default_factory=WeightConstraint)
    activation: ActivationConstraint = field(default_factory=ActivationConstraint)

    name: ClassVar[str] = "coupled"
