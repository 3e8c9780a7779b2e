"""Save a model so that it ends its answers elsewhere too, as it was taught to."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from cwac_lab.core.cache import read_json, write_json
from cwac_lab.models.chat import ChatFormat

_FILE = "generation_config.json"


def export(model: Any, chat: ChatFormat, folder: Path, start: Path) -> None:
    """Save a model and its tokenizer as a plain transformers folder.

    How the start samples is its owner's, and stays as it was; what ends and pads its answers is put right.

    Args:
        model: The fine-tuned model.
        chat: The chat format it was trained in.
        folder: Where to.
        start: Folder of the start, with the settings of generation that are kept.
    """
    model.save_pretrained(folder)
    _tokenizer(chat).save_pretrained(folder)
    kept = start / _FILE
    settings = read_json(kept if kept.is_file() else folder / _FILE)
    settings.pop("_from_model_config", None)  # or transformers may take the end from config.json again
    own = settings.get("eos_token_id")
    others = [] if own is None else own if isinstance(own, list) else [own]
    ends = [chat.end_id, *(end for end in others if end != chat.end_id)]
    settings |= {"eos_token_id": ends if len(ends) > 1 else ends[0], "pad_token_id": chat.pad_id}
    write_json(folder / _FILE, settings)


def _tokenizer(chat: ChatFormat) -> Any:
    """Return the tokenizer with the end of turn as its end, and with padding, where its template asks as before."""
    changed = copy.deepcopy(chat.tokenizer)
    changed.eos_token = changed.convert_ids_to_tokens(chat.end_id)
    if changed.pad_token is None:
        changed.pad_token = changed.convert_ids_to_tokens(chat.pad_id)
    probe = "question", "answer"
    same = ChatFormat(changed, chat.max_length).encode(*probe) == chat.encode(*probe)
    return changed if same else chat.tokenizer
