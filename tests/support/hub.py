"""A stand-in for the hub: it holds folders, notes what is fetched of them, or raises what the library raises."""

import shutil
from fnmatch import fnmatch

import huggingface_hub


def hub_with(monkeypatch, cache, **repositories):
    """Let repositories be fetched into folders of a cache that are named by repository and revision.

    Returns:
        A list that grows by name, revision and names of files of each call.
    """
    fetched = []

    def fetch(name, revision, allow_patterns, ignore_patterns):
        held = repositories[name]
        if isinstance(held, Exception):
            raise held
        target = cache / f"{held.name}-{revision}"
        target.mkdir(exist_ok=True, parents=True)
        wanted = [
            file
            for file in held.iterdir()
            if any(fnmatch(file.name, pattern) for pattern in allow_patterns)
            and not any(fnmatch(file.name, pattern) for pattern in ignore_patterns)
        ]
        for file in wanted:
            shutil.copy(file, target)
        fetched.append((name, revision, {file.name for file in wanted}))
        return str(target)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    return fetched
