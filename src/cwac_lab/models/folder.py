"""What a model folder holds, told from its small files and the headers of its weights: nothing is loaded or run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from cwac_lab.core.cache import file_digest
from cwac_lab.core.errors import ConfigError, MissingAsset
from cwac_lab.models.classes import auto_classes
from cwac_lab.models.sites import FAMILIES

CONFIG, ADAPTER = "config.json", "adapter_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# Small files that transformers reads, so that they must be JSON.
_JSON = (CONFIG, "generation_config.json", "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json")
# What a tokenizer is made of; one of the first kinds has its vocabulary.
VOCABULARY = ("tokenizer*.json", "tokenizer.model*", "*.model", "*.tiktoken", "tekken.json", "vocab.*", "merges.txt")
_SETTINGS = ("special_tokens_map.json", "added_tokens.json", "additional_chat_templates/*.jinja")
# In the order of the digest: what every folder has had since there are records, then the rest by name.
_IDENTITY = (CONFIG, "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja")
_POINTER = b"version https://git-lfs"
_SHOWN = 3
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ACCEPTED = "a folder with config.json, tokenizer and safetensors"
# What a folder that a user names may hold, and the file that tells it.
MODELS, ADAPTERS = "model", "adapter"
_HOLDS = {
    MODELS: ((CONFIG, ADAPTER), _ACCEPTED),
    ADAPTERS: ((ADAPTER,), f"a folder with {ADAPTER} and adapter_model.safetensors, as PEFT saves it"),
}
_MERGE = "PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(folder), with the tokenizer"


def _some(names: Iterable[str]) -> str:
    """Return up to three names, and how many there are if there are more."""
    every = sorted(names)
    return ", ".join(every[:_SHOWN]) + (f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else "")


def reason(error: Exception) -> str:
    """Return what an error of a library says, in one line that is not too long."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= 300 else f"{words[:300]} ..."


def named_folder(path: str, key: str = "model.path", kind: str = MODELS) -> Path:
    """Return the folder of a model or an adapter that a user named; ``~`` is the user's home.

    Raises:
        ConfigError: If there is none; the line says how a file or a model of the hub is used.
    """
    folder, (files, accepted) = Path(path).expanduser(), _HOLDS[kind]
    if any((folder / name).is_file() for name in files):
        return folder
    if folder.is_file():
        raise ConfigError(key, path, f"{accepted}, not a file")
    if not folder.exists():
        accepted += "; of the hub ORG/NAME, or hf://NAME"
    elif any(folder.glob("*.gguf")):
        accepted += "; of a GGUF file: what from_pretrained(folder, gguf_file=NAME) and save_pretrained make of it"
    raise ConfigError(key, path, accepted)


def holds_adapter(folder: Path) -> bool:
    """Tell whether a folder holds an adapter and no model."""
    return (folder / ADAPTER).is_file() and not (folder / CONFIG).is_file()


def merging(folder: Path) -> str:
    """Return how an adapter's folder becomes a model's."""
    held = read(folder, ADAPTER)
    kind, base = held.get("peft_type") or "an unknown kind", held.get("base_model_name_or_path") or "its base"
    if any(word in str(kind) for word in ("PROMPT", "PREFIX", "P_TUNING")):
        return f"{kind} cannot be merged into weights, so give {base} without it"
    return f"merge it ({kind}) into {base} first by {_MERGE}"


def read(folder: Path, name: str) -> dict[str, Any]:
    """Return a JSON object of a folder.

    Raises:
        MissingAsset: If the file holds none.
    """
    try:
        found = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        what = "a Git LFS pointer" if _is_pointer(folder / name) else f"no JSON ({reason(error)})"
        raise MissingAsset(f"{folder / name} is {what}; accepted: a JSON object") from error
    if not isinstance(found, dict):
        raise MissingAsset(f"{folder / name} holds a {type(found).__name__}; accepted: a JSON object")
    return found


def _is_pointer(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            return stream.read(len(_POINTER)) == _POINTER
    except OSError:
        return False


def check_files(folder: Path) -> None:
    """Check that what lies in a folder is one plain model: no adapter, no code to run, no numbers of few bits.

    Raises:
        MissingAsset: If not.
    """
    if not (folder / CONFIG).is_file():
        held = f"; it holds an adapter: {merging(folder)}" if (folder / ADAPTER).is_file() else ""
        raise MissingAsset(f"no {CONFIG} in {folder}; accepted: {_ACCEPTED}{held}")
    for name in _JSON:
        if (folder / name).exists():
            read(folder, name)
    if (folder / ADAPTER).exists():
        raise MissingAsset(
            f"{folder / ADAPTER} lies beside a whole model, so that it is not clear what is meant; accepted: a folder "
            f"without it, for the model as it is; or for the adapter, model.adapter=FOLDER"
        )
    config = read(folder, CONFIG)
    _check_code(folder, config)
    for key in ("quantization_config", "compression_config"):
        if config.get(key):
            method = config[key].get("quant_method", "unknown") if isinstance(config[key], dict) else config[key]
            raise MissingAsset(
                f"{folder / CONFIG}: {key} of method {method}: quantized weights cannot be trained; "
                "accepted: the model before quantization (tuning=qlora quantizes it in memory)"
            )


def _check_code(folder: Path, config: dict[str, Any]) -> None:
    from transformers import CONFIG_MAPPING, __version__

    kind = config.get("model_type")
    if not kind:
        raise MissingAsset(f"{folder / CONFIG}: no model_type; accepted: one of transformers, such as llama")
    if kind not in CONFIG_MAPPING:
        own = " and auto_map asks for code of its own, which is never run" if config.get("auto_map") else ""
        unknown = f"model_type={kind} is not in transformers {__version__}{own}"
        raise MissingAsset(f"{folder / CONFIG}: {unknown}; accepted: architectures such as {FAMILIES}")
    for key in ("attn_implementation", "experts_implementation"):
        if "/" in str(config.get(key) or ""):
            raise MissingAsset(f"{folder / CONFIG}: {key}={config[key]}: code of the hub is never run; accepted: sdpa")


def weight_files(folder: Path) -> list[Path]:
    """Return the files with the weights that transformers loads from a folder, in the order of their names.

    Raises:
        MissingAsset: If there are none, some are missing, or it is not clear which are meant.
    """
    named = read(folder, CONFIG).get("transformers_weights") if (folder / CONFIG).is_file() else None
    one, several = folder / (named or WEIGHTS), folder / INDEX
    if any(folder.glob("shard-*-model-*-of-*.safetensors")):
        raise MissingAsset(f"{folder} holds a checkpoint of several processes; accepted: what save_pretrained writes")
    if one.name.endswith(".index.json"):
        one, several = several, one
    if one.is_file() and several.is_file() and not named:
        raise MissingAsset(f"{folder} holds {WEIGHTS} and {INDEX}, of two models; accepted: one of them")
    if one.is_file():
        return [one]
    if several.is_file():
        return _shards(several)
    raise MissingAsset(f"no {one.name} in {folder}: {_instead(folder, one)}")


def _shards(index: Path) -> list[Path]:
    table = read(index.parent, index.name).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise MissingAsset(f"{index} has no weight_map; accepted: the index that save_pretrained writes")
    names = sorted({str(name) for name in table.values()})
    lost = [name for name in names if Path(name).name != name or not (index.parent / name).is_file()]
    if lost:
        raise MissingAsset(f"{index} names {_some(lost)}, not there; accepted: a folder with all {len(names)} shards")
    return [index.parent / name for name in names]


def _instead(folder: Path, wanted: Path) -> str:
    """Return what a folder without weights to load holds in their place, and what is accepted."""
    if wanted.is_symlink():
        return f"it is a link to {wanted.readlink()}, where nothing is; accepted: a whole download"
    if shards := [file.name for file in folder.glob("*.safetensors")]:
        return f"{_some(shards)} without {INDEX}; accepted: what save_pretrained writes"
    pickled = [file.name for ending in ("bin", "pt", "pth", "ckpt") for file in folder.glob(f"*.{ending}")]
    if files := [*pickled, *(file.name for file in folder.glob("*.gguf"))]:
        kinds = "pickled weights are" if pickled else "GGUF files are"
        return f"{kinds} not loaded ({_some(files)}); accepted: *.safetensors; convert them first"
    return "there are no weights; accepted: *.safetensors (pickled weights are not loaded; convert them first)"


def identity_files(folder: Path) -> list[Path]:
    """Return the files beside the weights that decide what a model answers: configuration and tokenizer."""
    first = [folder / name for name in _IDENTITY if (folder / name).is_file()]
    rest = {file for kind in (*VOCABULARY, *_SETTINGS) for file in folder.glob(kind) if file.is_file()}
    return [*first, *sorted(rest.difference(first))]


def has_vocabulary(folder: Path) -> bool:
    """Tell whether a folder has a tokenizer's vocabulary."""
    kinds = (file for kind in VOCABULARY for file in folder.glob(kind))
    return any(file.name != "tokenizer_config.json" for file in kinds)


def _words(folder: Path) -> list[Path]:
    """Return the files of a folder that make its tokenizer."""
    return [file for file in identity_files(folder) if file.name != CONFIG]


def words_digest(folder: Path) -> str:
    """Return the SHA-256 over the files of a folder's tokenizer."""
    return file_digest(_words(folder))


def copy_words(folder: Path, target: Path) -> None:
    """Copy the files of a folder's tokenizer into another folder."""
    for file in _words(folder):
        place = target / file.relative_to(folder)
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, place)


def headers(files: Iterable[Path]) -> dict[str, torch.Tensor]:
    """Return by name the tensors of safetensors files, empty on the meta device: shapes and types only.

    Raises:
        MissingAsset: If a file cannot be read or holds numbers of few bits.
    """
    found = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118
                    part = handle.get_slice(name)
                    kind = part.get_dtype()
                    if kind not in _FLOATS and (kind.startswith("F") or name.endswith("weight")):
                        raise MissingAsset(
                            f"{file}: {name} is held in {kind}; accepted: {' | '.join(_FLOATS)}, before quantization"
                        )
                    found[name] = torch.empty(part.get_shape(), dtype=_FLOATS.get(kind, torch.int64), device="meta")
        except (SafetensorError, OSError) as error:
            what = "a Git LFS pointer, not the weights: run `git lfs pull`" if _is_pointer(file) else reason(error)
            size = f"{file.stat().st_size:,} bytes" if file.exists() else "not there"
            raise MissingAsset(f"{file} ({size}) is no whole safetensors file: {what}") from error
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from saying at length what an error here says in a line."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def skeleton(folder: Path) -> Any:
    """Return the causal language model of a folder's configuration on the meta device, without weights.

    Raises:
        MissingAsset: If transformers cannot build one.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    kind = read(folder, CONFIG)["model_type"]
    try:
        with _quiet(), torch.device("meta"):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            plain = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not getattr(config, "is_encoder_decoder", False)
            if plain:
                return auto_classes()[0].from_config(config, trust_remote_code=False, dtype=torch.float32)
    except Exception as error:
        raise MissingAsset(f"{folder / CONFIG}: no {kind} model can be built of it: {reason(error)}") from error
    named = _some(map(str, config.architectures or [type(config).__name__]))
    what = "is no language model that reads text only, from left to right"
    raise MissingAsset(f"{folder / CONFIG}: {named} ({kind}) {what}; accepted: architectures such as {FAMILIES}")


def check_weights(folder: Path, model: Any) -> set[str]:
    """Check that a folder's weights are those of a model on the meta device, all and no others; returns their names.

    They are matched by transformers itself, with the names that it changes and the tensors that it joins on loading.

    Raises:
        MissingAsset: If not.
    """
    found = headers(weight_files(folder))
    try:
        with _quiet():
            _, matched = type(model).from_pretrained(
                None, config=model.config, state_dict=found, device_map={"": "meta"}, dtype=torch.float32,
                ignore_mismatched_sizes=True, output_loading_info=True, trust_remote_code=False,
            )  # fmt: skip
    except Exception as error:
        what = _unjoined(model, found) or reason(error)
        raise MissingAsset(f"{folder}: its weights do not fit {type(model).__name__}: {what}") from error
    check_matched(folder, type(model).__name__, matched)
    return set(found)


def _unjoined(model: Any, found: Mapping[str, torch.Tensor]) -> str:
    """Return what is missing or of another shape among the tensors that transformers joins on loading (experts)."""
    from transformers.core_model_loading import revert_weight_conversion

    written = revert_weight_conversion(model, model.state_dict())
    missing = written.keys() - found.keys() - model.all_tied_weights_keys.keys()
    shapes = {name for name, tensor in written.items() if name in found and found[name].shape != tensor.shape}
    return "; ".join(f"{what}: {_some(names)}" for what, names in _kinds(missing, set(), shapes) if names)


def check_matched(folder: Path, architecture: str, matched: Mapping[str, Any]) -> None:
    """Check what transformers says of the weights that it has loaded (its ``output_loading_info``).

    Raises:
        MissingAsset: If some are missing and would be drawn at random, have another shape, or have no place.
    """
    missing, unexpected = set(matched["missing_keys"]), set(matched["unexpected_keys"])
    shapes = {f"{name} {tuple(held)} for {tuple(wanted)}" for name, held, wanted in matched["mismatched_keys"]}
    told = [f"{what}: {_some(names)}" for what, names in _kinds(missing, unexpected, shapes) if names]
    told += [reason(error) for error in matched.get("error_msgs", ())]
    if told:
        raise MissingAsset(
            f"{folder}: its tensors are not those of {architecture}: {'; '.join(told)}; "
            f"accepted: all of them under its names{_prefix(missing, unexpected)}"
        )


def _kinds(missing: set[str], unexpected: set[str], shapes: set[str]) -> Iterator[tuple[str, set[str]]]:
    yield "missing", missing
    yield "of another shape", shapes
    yield "without a place", unexpected


def _prefix(missing: set[str], unexpected: set[str]) -> str:
    """Return a hint where all names that have no place are those of missing ones with something before them."""
    before = {held.removesuffix(name) for name in missing for held in unexpected if held.endswith(f".{name}")}
    if len(before) == 1 and all(held.startswith(tuple(before)) for held in unexpected):
        return f", without the prefix {before.pop()} (save the inner model)"
    return ""
