"""Where a model or an adapter is: a folder of this machine, or a repository of the hub, whose files are fetched."""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass
from pathlib import Path

from cwac_lab.core.errors import ConfigError, LabError, MissingAsset
from cwac_lab.core.outputs import FULL
from cwac_lab.models.folder import MODELS, named_folder, reason

# What the hub is asked for first: it tells whether the weights are worth fetching.
SMALL = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")
# The same weights again, in a format that is not read (Mistral's).
_TWICE = ("consolidated*",)
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_ADDRESSES = ("hf://", "https://huggingface.co/")
_LOGIN = "`hf auth login` or HF_TOKEN=TOKEN"


@dataclass(frozen=True)
class Source:
    """Where a model or an adapter is.

    Attributes:
        key: The setting that names it.
        name: What it says; of the hub ``ORG/NAME``.
        folder: The folder; None for a repository of the hub.
        revision: Commit, branch or tag of the repository.
        instead: What else can be done where the hub does not give it.
    """

    key: str
    name: str
    folder: Path | None = None
    revision: str = "main"
    instead: str = "name another model"

    @property
    def words(self) -> str:
        """What it is called on the screen and in records."""
        return self.name if self.folder is None else f"local folder {self.folder.name}"

    def small(self) -> Path:
        """Return the folder with all but the weights."""
        return self.files(*SMALL)

    def whole(self) -> Path:
        """Return the folder with the weights."""
        return self.files(*SMALL, "*.safetensors")

    def files(self, *patterns: str) -> Path:
        """Return the folder; of the hub only files of these patterns are sure to be in it.

        Raises:
            LabError: If the hub does not give them; one line says why and what to do.
        """
        if self.folder is not None:
            return self.folder
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        # The first base is what the library's client raises for a connection that breaks.
        transport: type[Exception] = HfHubHTTPError.__bases__[0]
        try:
            return Path(
                snapshot_download(
                    self.name, revision=self.revision, allow_patterns=list(patterns), ignore_patterns=list(_TWICE)
                )
            )
        except HFValidationError as error:
            raise ConfigError(self.key, self.name, f"ORG/NAME of the hub ({reason(error)})") from error
        except (transport, OSError, RuntimeError) as error:
            raise self._refused(error) from error

    def _refused(self, error: Exception) -> LabError:
        """Return in one line why the hub does not give the files, and what to do."""
        from huggingface_hub.errors import RevisionNotFoundError

        if isinstance(error, RevisionNotFoundError):
            key = "model.revision" if self.key == "model.path" else f"revision of {self.key}={self.name}"
            return ConfigError(key, self.revision, f"a commit, branch or tag of {self.name}")
        return MissingAsset(f"{self.key}={self.name}: {_why(error, self.name)}; or {self.instead}")


def _why(error: Exception, name: str) -> str:
    """Return why the hub does not give a repository, and what helps."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        DisabledRepoError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    page = f"https://huggingface.co/{name}"
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
    if isinstance(error, GatedRepoError):
        return f"gated, its owner lets in who asks; ask on {page}, then {_LOGIN}"
    if isinstance(error, RepositoryNotFoundError):
        return f"no repository of the hub that you may see; correct the name, or for a private one {_LOGIN}"
    if isinstance(error, DisabledRepoError):
        return f"its owner or the hub has switched it off ({page}); choose another model"
    if isinstance(error, LocalEntryNotFoundError):
        part = "only a part of it is" if type(error).__name__ == "IncompleteSnapshotError" else "it is not"
        if isinstance(cause, OfflineModeIsEnabled):
            return f"{part} in the cache of the hub, and HF_HUB_OFFLINE=1 forbids to fetch it; unset that"
        if not isinstance(cause, HfHubHTTPError):
            told = "" if cause is error else f" ({reason(cause)})"
            return f"{part} in the cache of the hub, which cannot be reached{told}; connect"
    if isinstance(cause, HfHubHTTPError):
        status = cause.response.status_code
        if status in (401, 403):
            return f"the hub refuses your token ({status}); {_LOGIN} with one that may read it"
        return f"the hub answers {status}; try again later"
    if (isinstance(error, OSError) and error.errno in FULL) or "No space left" in str(error):
        return f"no space left in {constants.HF_HUB_CACHE}; free some, set HF_HOME=FOLDER on another disk"
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{constants.HF_HUB_CACHE} cannot be written to; set HF_HOME=FOLDER that can"
    return f"it cannot be fetched ({type(error).__name__}: {reason(error)}); try again"


def source(key: str, value: str, revision: str | None = None, kind: str = MODELS) -> Source:
    """Return where a setting points to: a folder that is there, else a repository of the hub.

    ``hf://NAME`` is always one of the hub.

    Args:
        key: The setting.
        value: A folder, ``ORG/NAME``, or an address of the hub.
        revision: Commit, branch or tag of the repository.
        kind: What the folder holds, ``MODELS`` (which may be adapters) or ``ADAPTERS``.

    Raises:
        ConfigError: If it is none of these.
    """
    address = value.rstrip("/")
    for start in _ADDRESSES:
        address = address.removeprefix(start)
    of_the_hub = address != value.rstrip("/") and address.count("/") <= 1
    if of_the_hub or (_REPOSITORY.fullmatch(address) and not Path(value).expanduser().exists()):
        return Source(key, address, None, revision or "main", f"name a folder that is here ({value} is none)")
    folder = named_folder(value, key, kind).resolve()
    if revision is not None:
        raise ConfigError("model.revision", revision, f"null with a folder ({key}={value})")
    return Source(key, value, folder)
