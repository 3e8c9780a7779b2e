"""Which defences go together in one run."""

from __future__ import annotations

from collections.abc import Mapping

from cwac_lab.core.errors import ConfigError
from cwac_lab.defenses.interface import Defense


def check_together(parts: Mapping[str, Defense]) -> None:
    """Check that no part of a composition moves weights where another has put them.

    Raises:
        ConfigError: If two parts each hold the update in a space of their own, or one slows what another changes.
    """
    needs = {name: part.requirements for name, part in parts.items()}
    exact = [name for name, each in needs.items() if each.exact_projection or each.whole_update or each.subspace]
    if len(exact) > 1:
        accepted = f"one of {' | '.join(exact)}: each moves what another holds"
        raise ConfigError("constraint", f"[{','.join(exact)}]", accepted)
    slowed = [name for name, part in parts.items() if getattr(part, "tail", None) == "slowed"]
    moved = [name for name, part in parts.items() if part.settles_factors]
    if slowed and moved:
        accepted = f"free | penalised beside {moved[0]}: a tail is slowed from the last weights, which that changes"
        raise ConfigError(f"constraint.{slowed[0]}.tail", "slowed", accepted)
    bounded = [name for name, part in parts.items() if part.bounds_update]
    after = [name for name, part in parts.items() if part.settles_once and not part.settles_factors]
    if bounded and after:
        pair = sorted((bounded[0], after[0]))
        accepted = f"one of {' | '.join(pair)}: {after[0]} changes after training what {bounded[0]} bounds"
        raise ConfigError("constraint", f"[{','.join(pair)}]", accepted)
    scaled = [name for name, part in parts.items() if part.scales_rows]
    outputs = [name for name, part in parts.items() if part.holds_outputs]
    if outputs and after:
        pair = sorted((outputs[0], after[0]))
        accepted = f"one of {' | '.join(pair)}: {after[0]} changes after training what {outputs[0]} holds"
        raise ConfigError("constraint", f"[{','.join(pair)}]", accepted)
    if scaled and outputs:
        accepted = f"frobenius beside {outputs[0]}, which holds what an update writes"
        raise ConfigError(f"constraint.{scaled[0]}.norm", "mars", accepted)
