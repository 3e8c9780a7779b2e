import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from cwac_lab.core import provenance
from cwac_lab.core.cache import KEY_FILE, cached_folder, digest, read_json, reading, write_json
from cwac_lab.core.errors import ConfigError, LabError
from cwac_lab.data.pools import Pools
from cwac_lab.defenses.cwac.sae import latents
from cwac_lab.defenses.cwac.subspace import basis
from cwac_lab.models.loading import ModelFolder
from cwac_lab.run.start import Start
from cwac_lab.training.checkpoint import Resume
from support import tiny


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


def one(folder):
    write_json(folder / "x.json", {"made": 1})


def leave_no_key(folder):
    (folder / KEY_FILE).unlink()


def leave_half_a_key(folder):
    (folder / KEY_FILE).write_text('{"a"')


def leave_another_key(folder):
    write_json(folder / KEY_FILE, {"a": 2})


def leave_a_list(folder):
    (folder / KEY_FILE).write_text("[1]")


def leave_what_another_program_wrote(folder):
    for path in folder.iterdir():
        path.unlink()
    (folder / "sub").mkdir()
    (folder / "sub" / "notes.txt").write_text("mine")


@pytest.mark.parametrize(
    "damage", [leave_no_key, leave_half_a_key, leave_another_key, leave_a_list, leave_what_another_program_wrote]
)
def test_a_folder_that_does_not_hold_its_key_is_put_aside_and_built(damage, tmp_path):
    for _ in range(2):  # the second time something has been put aside before
        folder = cached_folder(tmp_path, "kind", {"a": 1}, one)
        damage(folder)
        left = sorted(path.name for path in folder.rglob("*"))
        assert cached_folder(tmp_path, "kind", {"a": 1}, one) == folder
        assert read_json(folder / "x.json") == {"made": 1}
        assert read_json(folder / KEY_FILE) == {"a": 1}
        aside = folder.with_name(f"{folder.name}.incomplete")
        assert sorted(path.name for path in aside.rglob("*")) == left


def test_whatever_stands_in_the_place_of_a_folder_is_put_aside(tmp_path):
    target, elsewhere = tmp_path / "kind" / digest({"a": 1})[:16], tmp_path / "elsewhere"
    target.parent.mkdir()
    elsewhere.mkdir()
    (elsewhere / "mine").write_text("x")
    to_file, to_folder = (lambda: target.write_text("x")), (lambda: target.mkdir())
    to_link, to_nothing = (lambda: target.symlink_to(elsewhere)), (lambda: target.symlink_to(tmp_path / "nothing"))
    for put in (to_file, to_folder, to_file, to_link, to_folder, to_nothing, to_link, to_file):
        put()
        assert (cached_folder(tmp_path, "kind", {"a": 1}, one) / "x.json").is_file()
        shutil.rmtree(target)
    assert (elsewhere / "mine").is_file()


def test_a_key_is_found_again_whatever_its_order_and_types(tmp_path):
    built = []
    for key in ({"a": (1, 2), "b": {"c": None, "d": 0.1}}, {"b": {"d": 0.1, "c": None}, "a": [1, 2]}):
        cached_folder(tmp_path, "kind", key, lambda folder: built.append(one(folder)))
    assert len(built) == 1


KILLED = """
import os, signal, sys
from pathlib import Path
from cwac_lab.core.cache import cached_folder
def build(folder):
    (folder / "half").write_text("x" * 1000)
    os.kill(os.getpid(), signal.SIGKILL)
cached_folder(Path(sys.argv[1]), "kind", {"a": int(sys.argv[2])}, build)
"""


def scratch_of(root):
    return sorted((root / "kind").glob(".building-*"))


def test_what_killed_builds_left_goes_and_what_others_are_building_stays(tmp_path):
    for number in (1, 2, 2):  # each removes what the one before left, of another key or of its own
        subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), str(number)], check=False)
        assert len(scratch_of(tmp_path)) == 1
    started, goes_on = threading.Event(), threading.Event()

    def slow(folder):
        one(folder)
        started.set()
        assert goes_on.wait(30)

    with ThreadPoolExecutor(1) as pool:
        third = pool.submit(cached_folder, tmp_path, "kind", {"a": 3}, slow)
        assert started.wait(30)
        cached_folder(tmp_path, "kind", {"a": 1}, one)
        (left,) = scratch_of(tmp_path)  # that of the third, which is alive
        goes_on.set()
        assert (third.result() / "x.json").is_file()
    assert left.name.startswith(f".building-{third.result().name}-")
    assert scratch_of(tmp_path) == []


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ConfigError, match=r"cache_root=.*cache: accepted: a folder that can be written") as raised:
        cached_folder(tmp_path / "cache", "kind", {"a": 1}, one)
    assert "\n" not in str(raised.value)


def test_a_cache_that_cannot_be_written_is_read(tmp_path, monkeypatch):
    folder = cached_folder(tmp_path, "kind", {"a": 1}, one)

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)
    assert cached_folder(tmp_path, "kind", {"a": 1}, one) == folder
    with pytest.raises(ConfigError, match="Permission denied"):
        cached_folder(tmp_path, "kind", {"a": 2}, one)


def subspace(folder):
    save_file({"site": torch.eye(3)}, folder / "bases.safetensors")
    write_json(folder / "report.json", {"site": {"kept": 0.9, "complement": False}})


def features(folder):
    weight = torch.eye(3)
    latents.export(
        folder, 0, (weight, torch.ones(3), 2), torch.tensor([1]), weight[0], torch.ones(1), {}, torch.ones(8, 3)
    )


def checkpoint(folder):
    write_json(folder / "state.json", {"identity": "i", "step": 1, "schedule": {}})


LOADED = {
    "bases.safetensors": (subspace, basis.load),
    "report.json": (subspace, basis.load),
    "layer0.safetensors": (features, latents.load),
    "layer0.json": (features, latents.load),
    "state.json": (checkpoint, lambda folder: Resume.find(folder, "i")),
}


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def emptied(file):
    file.write_bytes(b"")


def zeros(file):
    file.write_bytes(bytes(file.stat().st_size))


@pytest.mark.parametrize("damage", [cut, emptied, zeros])
@pytest.mark.parametrize("name", LOADED)
def test_a_damaged_file_is_one_line_that_says_how_to_mend_it(name, damage, tmp_path):
    build, load = LOADED[name]
    folder = cached_folder(tmp_path, "kind", {"a": 1}, build)
    load(folder)
    damage(folder / name)
    with pytest.raises(LabError, match=r"missing or damaged .* remove this folder to have it made anew") as raised:
        load(folder)
    assert str(folder) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_error_of_ours_stays_as_it_is(tmp_path):
    with pytest.raises(ConfigError, match="k=1"), reading(tmp_path):
        raise ConfigError("k", 1, "2")
    with pytest.raises(ZeroDivisionError), reading(tmp_path):
        _ = 1 / 0


def test_a_damaged_start_in_the_cache_is_one_line(tmp_path):
    asked = SimpleNamespace(
        dtype=torch.float32,
        trainer=SimpleNamespace(device="cpu", max_length=64),
        model=SimpleNamespace(chat_template=None),
    )
    folder = cached_folder(tmp_path, "aligned", {"a": 1}, tiny.save)
    begin = Start(ModelFolder(folder, "words", "content"), Pools({}))
    begin.load(asked)
    cut(folder / "model.safetensors")
    with pytest.raises(LabError, match=r"missing or damaged .* remove this folder to have it made anew"):
        begin.load(asked)


@pytest.mark.parametrize(("name", "counts"), [("a.py", 1), ("data/b.yaml", 1), ("c.csv", 1), ("d.pyc", 0)])
def test_all_that_rows_and_tables_are_made_of_is_among_the_sources(name, counts, tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path)
    (tmp_path / "data").mkdir()
    before = provenance.sources()
    (tmp_path / name).write_text("x: 1")
    there = provenance.sources()
    (tmp_path / name).write_text("x: 22")
    assert len({before, there, provenance.sources()}) == 1 + 2 * counts
