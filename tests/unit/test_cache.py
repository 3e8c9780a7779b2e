import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from cwac_lab.cache import cached_folder, write_json


def test_a_build_that_fails_leaves_nothing(tmp_path):
    def broken(folder):
        (folder / "half").write_text("x")
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        cached_folder(tmp_path, "kind", {"a": 1}, broken)
    assert not any(path.is_dir() for path in (tmp_path / "kind").iterdir())
    built = []
    for _ in range(2):
        folder = cached_folder(tmp_path, "kind", {"a": 1}, lambda f: built.append(write_json(f / "x.json", {})))
    assert (folder / "x.json").is_file()
    assert len(built) == 1


def test_those_who_need_a_folder_at_once_build_it_once(tmp_path):
    built = []

    def build(folder):
        time.sleep(0.2)
        built.append(write_json(folder / "x.json", {}))

    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: cached_folder(tmp_path, "kind", {"a": 1}, build), range(4)))
    assert len(built) == len(folders) == 1
