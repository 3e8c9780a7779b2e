"""Settings that came later: what runs did that do not name them, whatever today's defaults are."""

from __future__ import annotations

from typing import Any

# By part of a constraint.
BEFORE: dict[str, dict[str, Any]] = {
    "weight": {
        "energy_by_kind": {"attn_in": None, "attn_out": None, "ffn_in": None, "ffn_out": None},
        **{"opening": "counted", "answers": "none", "closing_weight": 1.0},
        **{
            "directions": "leading",
            "factor_norm": "projected",
            "tail": "free",
            "tail_energy": 0.9999,
            "tail_strength": 100.0,
        },
    },
    "activation": {"answer_tokens": 0},
    "kl": {"every_n_steps": 1},
    "ldifs": {"held_on": "task", "batch_size": 4},
}
# Of every form.
FORM_BEFORE: dict[str, Any] = {"instruction": True}
# By the way of tuning.
TUNED_BEFORE: dict[str, dict[str, Any]] = {"null_space": {"free_directions": None}}


def completed(config: dict[str, Any]) -> dict[str, Any]:
    """Return a recorded configuration in which its forms, its tuning and its constraint's parts name these settings."""
    tuning = config.get("tuning") or {}
    if later := TUNED_BEFORE.get(tuning.get("method", "")):
        config = {**config, "tuning": {**later, **tuning}}
    if others := (config.get("forms") or {}).get("others"):
        forms = {name: {**FORM_BEFORE, **form} for name, form in others.items()}
        config = {**config, "forms": {**config["forms"], "others": forms}}
    parts = dict(config.get("constraint") or {})
    for name in parts.keys() & BEFORE.keys():
        parts[name] = {**parts[name], **{key: value for key, value in BEFORE[name].items() if key not in parts[name]}}
    return {**config, "constraint": parts} if parts else config
