"""What is uploaded, against a stand-in for the hub."""

from __future__ import annotations

import re
from types import SimpleNamespace

import httpx
import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError

from cwac_lab.config.groups import ExportConfig
from cwac_lab.config.run import read
from cwac_lab.core.errors import ConfigError, MissingAsset
from cwac_lab.run import push
from support import tiny


class Hub:
    """Takes what is uploaded; refuses where it is told to."""

    def __init__(self, refuses=False):
        self.refuses, self.made, self.taken, self.private = refuses, [], [], True

    def create_repo(self, name, *, private, exist_ok):
        self.made.append((name, private, exist_ok))

    def repo_info(self, name):
        return SimpleNamespace(private=self.private)

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        if self.refuses:
            response = httpx.Response(403, request=httpx.Request("POST", "https://hub.invalid"))
            raise HfHubHTTPError("403 Forbidden: no\nright to write", response=response)
        self.taken.append((repo_id, sorted(file.name for file in folder_path.iterdir())))


@pytest.fixture
def hub(monkeypatch):
    found = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: found)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token")
    return found


def test_a_folder_goes_into_a_private_repository(hub, tmp_path):
    (tmp_path / "README.md").write_text("card")
    told = []
    push.push(ExportConfig("org/name"), tmp_path, told.append)
    assert hub.made == [("org/name", True, True)]
    assert hub.taken == [("org/name", ["README.md"])]
    assert told == [f"uploaded to org/name: {tmp_path.name}"]


def test_what_the_hub_refuses_is_one_line_and_the_folder_stays(hub, tmp_path):
    hub.refuses = True
    with pytest.raises(MissingAsset, match=r"export.push=org/name: .*no right to write.*stays: upload it by hand"):
        push.push(ExportConfig("org/name"), tmp_path, print)
    assert tmp_path.is_dir()


def test_what_is_to_be_private_does_not_go_into_a_public_repository(hub, tmp_path):
    hub.private = False
    with pytest.raises(MissingAsset, match=r"the repository is public; export\.private=false uploads to it"):
        push.push(ExportConfig("org/name"), tmp_path, print)
    assert hub.taken == []
    push.push(ExportConfig("org/name", private=False), tmp_path, print)
    assert len(hub.taken) == 1


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["export.push=org/na--me"], "export.push=org/na--me: accepted: a repository of the hub"),
        (["export.push=name"], "export.push=name: accepted: a repository of the hub, ORG/NAME"),
        (["export.push=org/name", "trainer.export=false"], "export.push=org/name: accepted: null, or a run that saves"),
        (
            ["export.push=org/name", "tuning=lora", "tuning.save=adapter"],
            "tuning.save=adapter: accepted: merged | both",
        ),
    ],
)
def test_it_is_checked_before_anything_is_computed(overrides, words, hub):
    with pytest.raises(ConfigError, match=re.escape(words)):
        push.check(read(tiny.config(*overrides)))


def test_who_uploads_is_logged_in(hub, monkeypatch):
    run = read(tiny.config("export.push=org/name"))
    push.check(run)
    push.check(read(tiny.config("trainer.export=false")))
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ConfigError, match="hf auth login"):
        push.check(run)
    assert push.listed(ExportConfig("org/name"), 10**9) == "upload: 1.0 GB to org/name, private if it is made anew"
