"""A stand-in server for the tests of the judge at an endpoint."""

import pytest

from cwac_lab.judges import server
from support.chat_server import standing


@pytest.fixture
def stand(monkeypatch):
    monkeypatch.setattr(server, "FIRST_WAIT", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with standing() as found:
        yield found
