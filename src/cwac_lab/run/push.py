"""Upload what a run saved to the hub: the merged model, or the adapter where that alone was saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cwac_lab.config.groups import ExportConfig
from cwac_lab.config.run import Run
from cwac_lab.core.errors import ConfigError, MissingAsset


def check(run: Run) -> None:
    """Check that there will be something to upload, and somebody to upload it, before anything is computed.

    Raises:
        ConfigError: If not.
    """
    config = run.export
    if config.push is None:
        return
    if not (run.finetune and run.trainer.export):
        raise ConfigError("export.push", config.push, "null, or a run that saves a model: trainer.export=true")
    made_here = run.model.align != "none" or run.model.adapter is not None
    if run.tuning.save == "adapter" and made_here:
        accepted = "merged | both with export.push: nobody else has the start that this adapter belongs to"
        raise ConfigError("tuning.save", run.tuning.save, accepted)
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(config.push)
    except HFValidationError as error:
        raise ConfigError("export.push", config.push, f"a repository of the hub, ORG/NAME ({error})") from None
    if get_token() is None:
        raise ConfigError("export.push", config.push, "null, or somebody who is logged in: hf auth login")


def push(config: ExportConfig, folder: Path, say: Callable[[str], None]) -> None:
    """Upload a folder; a repository that is not there is made.

    Args:
        config: Where it goes.
        folder: What is uploaded, with its model card.
        say: Told where it lies then.

    Raises:
        MissingAsset: If the hub does not take it; the folder stays.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    assert config.push is not None
    api = HfApi()
    try:
        api.create_repo(config.push, private=config.private, exist_ok=True)
        if config.private and not api.repo_info(config.push).private:
            raise OSError("the repository is public; export.private=false uploads to it")
        api.upload_folder(repo_id=config.push, folder_path=folder, commit_message="Upload by cwac-lab")
    except (HfHubHTTPError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise MissingAsset(f"export.push={config.push}: {reason}; {folder} stays: upload it by hand") from None
    say(f"uploaded to {config.push}: {folder.name}")


def listed(config: ExportConfig, size: int) -> str:
    """Return what would be uploaded, in words; ``size`` in bytes."""
    kind = "private" if config.private else "public"
    return f"upload: {size / 1e9:.1f} GB to {config.push}, {kind} if it is made anew"
