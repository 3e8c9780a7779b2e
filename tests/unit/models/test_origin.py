"""What a model's card states is handed on; what it does not state is not made up."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import Mock

import huggingface_hub
import pytest
from huggingface_hub import errors

from cwac_lab.models.origin import CARD, Origin, merged, origin

OTHER = "license: other\nlicense_name: llama3.2\nlicense_link: LICENSE"


def card(block):
    return f"---\n{block}\n---\n# A model\n"


@pytest.mark.parametrize(
    ("text", "stated"),
    [
        (card("license: apache-2.0"), ("apache-2.0", None, None)),
        (card("license: [mit, apache-2.0]"), ("other", "mit-and-apache-2.0", None)),
        (card("license: other\nlicense_name: own\nlicense_link: https://a.b/c"), ("other", "own", "https://a.b/c")),
        (card(OTHER), ("other", "llama3.2", None)),
        (card("tags: [x]"), (None, None, None)),
        (card("license: 3"), (None, None, None)),
        (card("license: {a: b"), (None, None, None)),
        (card("- a list"), (None, None, None)),
        ("# A model, license: mit\n", (None, None, None)),
        ("\ufeff" + card("license: mit"), ("mit", None, None)),
        (None, (None, None, None)),
    ],
)
def test_of_a_folder_its_card_states_the_licence(text, stated, tmp_path):
    if text is not None:
        (tmp_path / CARD).write_text(text, encoding="utf-8")
    assert origin(tmp_path) == Origin(None, *stated)


def test_a_card_that_is_no_text_states_nothing(tmp_path):
    (tmp_path / CARD).write_bytes(b"---\nlicense: \xff\n---\n")
    assert origin(tmp_path) == Origin()


def test_of_the_hub_the_card_is_fetched_beside_the_weights(tmp_path, monkeypatch):
    (tmp_path / CARD).write_text(card(OTHER))
    fetched = []

    def fetch(name, file, revision):
        fetched.append((name, file, revision))
        return str(tmp_path / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    snapshot = tmp_path / "0123abc"
    snapshot.mkdir()
    link = "https://huggingface.co/some/model/blob/main/LICENSE"
    assert origin(snapshot, "some/model") == Origin("some/model", "other", "llama3.2", link)
    assert fetched == [("some/model", CARD, "0123abc")]
    (snapshot / CARD).write_text(card("license: mit"))
    assert origin(snapshot, "some/model") == Origin("some/model", "mit")
    assert len(fetched) == 1


def test_an_adapter_of_other_terms_is_named_beside_its_base():
    base = Origin("some/model", "apache-2.0")
    assert merged(base, Origin("some/adapter", "apache-2.0")) == base
    for stated, name in (("cc-by-nc-4.0", "cc-by-nc-4.0"), (None, "not-stated")):
        told = Origin("some/model", "other", f"base-apache-2.0-adapter-{name}")
        assert merged(base, Origin("some/adapter", stated)) == told


@pytest.mark.parametrize("offline", [True, False])
def test_a_card_that_the_hub_does_not_give_states_nothing(offline, tmp_path, monkeypatch):
    response = SimpleNamespace(headers={}, request=None, status_code=404)
    lacking = Mock(side_effect=errors.RemoteEntryNotFoundError("no such file", response=response))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", huggingface_hub.hf_hub_download if offline else lacking)
    assert origin(tmp_path, "some/model") == Origin("some/model")
