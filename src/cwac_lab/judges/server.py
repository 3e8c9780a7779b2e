"""A server that speaks the chat-completions protocol (OpenAI, vLLM, llama.cpp, ollama, TGI): a question, a reply."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    sleep_using_event,
    stop_after_attempt,
    stop_when_event_set,
    wait_exponential_jitter,
)

from cwac_lab.core.errors import ConfigError

if TYPE_CHECKING:
    from cwac_lab.judges.endpoint import EndpointConfig

# Seconds before the first repetition, twice that before the next, and the most.
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0
# Answers of a server that is busy or out of order for now.
_PASSING = (408, 429)
# Characters of a server's words that an error shows.
_SHOWN = 160
_KEY = "evaluation.endpoint"


@dataclass(frozen=True)
class Reply:
    """What a model said, and what that took.

    Attributes:
        text: It; empty where the server held it back.
        read: Tokens of the question, as the server counts them.
        written: Tokens of the reply.
    """

    text: str
    read: int
    written: int


class _Again(Exception):
    """A request that may succeed later.

    Attributes:
        after: Seconds that the server asks to wait.
    """

    def __init__(self, words: str, after: float = 0.0) -> None:
        super().__init__(words)
        self.after = after


class Server:
    """A connection to the server of some settings; its key is read from the environment and kept here only."""

    def __init__(self, settings: EndpointConfig) -> None:
        """Open no connection yet."""
        self._settings = settings
        self._key = os.environ.get(settings.key_env, "").strip()
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        most = httpx.Limits(max_connections=settings.concurrency)
        self._client = httpx.Client(headers=headers, timeout=settings.timeout_s, limits=most)
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Let nobody wait for another try."""
        self._stopped.set()

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def reach(self) -> None:
        """Look whether the server is there and takes the key, without asking a model.

        Raises:
            ConfigError: If not. A server without a list of models passes.
        """
        try:
            found = self._client.get(f"{self._base}/models")
        except httpx.TransportError as error:
            raise self._away(error) from None
        if found.status_code in (401, 403):
            raise self._refused(found)

    def ask(self, messages: list[dict[str, str]]) -> Reply:
        """Return what the model says to messages, at temperature 0; repeated where the server is busy or out of order.

        Raises:
            ConfigError: If the server cannot be reached, refuses, or is still out of order after all repetitions.
        """
        settings = self._settings
        body = {
            "model": settings.model, "messages": messages, "temperature": 0, "max_tokens": settings.max_tokens,
        }  # fmt: skip
        again = Retrying(
            stop=stop_after_attempt(settings.retries + 1) | stop_when_event_set(self._stopped),
            sleep=sleep_using_event(self._stopped),
            wait=_pause,
            retry=retry_if_exception_type(_Again),
            reraise=True,
        )
        try:
            return self._read(again(self._post, body))
        except _Again as error:
            tries = f"more than that, or a server that answers: {settings.url} {error}, {settings.retries + 1} times"
            raise ConfigError(f"{_KEY}.retries", settings.retries, tries) from None

    @property
    def _base(self) -> str:
        return str(self._settings.url).rstrip("/")

    def _post(self, body: dict[str, Any]) -> httpx.Response:
        try:
            found = self._client.post(f"{self._base}/chat/completions", json=body)
        except httpx.TimeoutException:
            raise _Again(f"said nothing for {self._settings.timeout_s:g} s (timeout_s)") from None
        except httpx.ConnectError as error:
            raise self._away(error) from None
        except httpx.TransportError as error:
            raise _Again(f"broke off ({type(error).__name__})") from None
        status = found.status_code
        if status in _PASSING or status >= 500:
            raise _Again(f"said {status}{self._words(found)}", _asked_to_wait(found))
        if status in (401, 403):
            raise self._refused(found)
        if status != 200:
            raise self._wrong(found)
        return found

    def _read(self, found: httpx.Response) -> Reply:
        try:
            told = found.json()
            text, usage = told["choices"][0]["message"].get("content"), told.get("usage") or {}
            return Reply(text or "", int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            accepted = f"a server of the chat-completions protocol (it said {self._safe(found.text)!r})"
            raise ConfigError(f"{_KEY}.url", self._settings.url, accepted) from None

    def _away(self, error: httpx.TransportError) -> ConfigError:
        accepted = (
            f"the address of a server that can be reached, e.g. http://localhost:8000/v1 ({self._safe(str(error))})"
        )
        return ConfigError(f"{_KEY}.url", self._settings.url, accepted)

    def _refused(self, found: httpx.Response) -> ConfigError:
        """Return the error of a key that is not taken; without the server's words, which may quote it."""
        held = "holds another" if self._key else "is not set"
        accepted = (
            f"an environment variable with a key that {self._settings.url} takes ({found.status_code}; it {held})"
        )
        return ConfigError(f"{_KEY}.key_env", self._settings.key_env, accepted)

    def _wrong(self, found: httpx.Response) -> ConfigError:
        """Return the error of a request that is not taken: of the address where it is not known, else of the model."""
        said = f"({found.status_code}{self._words(found)})"
        no_such_place = found.status_code in (404, 405) and str(self._settings.model) not in self._words(found)
        if no_such_place or found.is_redirect:
            accepted = f"the address that /chat/completions follows, e.g. http://localhost:8000/v1 {said}"
            return ConfigError(f"{_KEY}.url", self._settings.url, accepted)
        return ConfigError(
            f"{_KEY}.model", self._settings.model, f"a model that {self._settings.url} answers by {said}"
        )

    def _words(self, found: httpx.Response) -> str:
        """Return what a server says of an error, after a colon."""
        try:
            told = found.json()
            told = told.get("error", told.get("message", ""))
            told = told.get("message", "") if isinstance(told, dict) else told
        except (ValueError, AttributeError):
            return ""
        return f": {self._safe(str(told))}" if told else ""

    def _safe(self, words: str) -> str:
        """Return words in one short line, without the key."""
        words = " ".join((words.replace(self._key, "***") if self._key else words).split())
        return words if len(words) <= _SHOWN else f"{words[:_SHOWN]}..."


def _asked_to_wait(found: httpx.Response) -> float:
    """Return the seconds of ``Retry-After``; 0 where there are none (or a date, which no such server sends)."""
    try:
        return min(float(found.headers["retry-after"]), LONGEST_WAIT)
    except (KeyError, ValueError):
        return 0.0


def _pause(state: RetryCallState) -> float:
    """Return how long to wait: what the server asks for, else longer each time, with some chance."""
    error = state.outcome.exception() if state.outcome else None
    backoff = wait_exponential_jitter(initial=FIRST_WAIT, max=LONGEST_WAIT, jitter=FIRST_WAIT)(state)
    return max(backoff, error.after if isinstance(error, _Again) else 0.0)
