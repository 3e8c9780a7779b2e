"""What all workers of one call of pytest compute once."""

from functools import cache

from filelock import FileLock
from safetensors.torch import load_file, save_file

from cwac_lab.judges import classifier


def head(folder):
    """Let the classifier's head be trained by the worker that asks for it first; others read it from the folder."""
    train, file = classifier._head, folder / "head.safetensors"

    @cache
    def shared():
        with FileLock(f"{file}.lock"):
            if not file.is_file():
                save_file({"head": train()}, file)
        return load_file(file)["head"]

    classifier._head = shared
