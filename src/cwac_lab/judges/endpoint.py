"""A judge at an endpoint: any server that speaks the chat-completions protocol, asked by a rubric.

Replies are cached by content, so that to judge again costs nothing. The key of the server comes from the environment,
and is in no configuration, record, cache or error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from cwac_lab.core.cache import digest, read_json, write_json
from cwac_lab.core.errors import ConfigError, in_range
from cwac_lab.judges.base import Verdict
from cwac_lab.judges.incoherent import RULE
from cwac_lab.judges.rubric import BUILT_IN, RECIPE, Rubric, rubric

if TYPE_CHECKING:
    from cwac_lab.judges.server import Server

NAME = "endpoint"
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
# In the place of a value that may hold a secret.
_HIDDEN = "(not shown)"


@dataclass
class EndpointConfig:
    """Settings of the judge ``endpoint``.

    Attributes:
        url: Address of the server, as ``/chat/completions`` follows it; without a user's name or key.
        model: Name of the model there.
        rubric: What it is asked: a rubric of the package, or the path of a YAML file.
        key_env: Environment variable that holds the key; it may be unset for a server that needs none.
        timeout_s: Seconds that a reply may take.
        retries: Repetitions of a request where the server is busy, out of order or silent; each waits longer.
        concurrency: Requests at once.
        max_tokens: Length of a reply.
    """

    url: str | None = None
    model: str | None = None
    rubric: str = BUILT_IN[0]
    key_env: str = "OPENAI_API_KEY"
    timeout_s: float = 60.0
    retries: int = 5
    concurrency: int = 4
    max_tokens: int = 300

    def __post_init__(self) -> None:
        """Check the fields."""
        if self.url is not None and not _is_address(self.url):
            shown = _HIDDEN if "@" in self.url or "?" in self.url else self.url
            raise ConfigError("url", shown, "http://HOST/PATH or https://HOST/PATH, without a user's name or a query")
        if self.model is not None and not self.model.strip():
            raise ConfigError("model", self.model, "the name of a model")
        if not _VARIABLE.fullmatch(self.key_env):
            raise ConfigError("key_env", _HIDDEN, "the name of an environment variable in capitals, not the key itself")
        in_range("timeout_s", self.timeout_s, 0, open_low=True)
        in_range("retries", self.retries, 0)
        in_range("concurrency", self.concurrency, 1)
        in_range("max_tokens", self.max_tokens, 1)

    def check(self) -> None:
        """Check that what has no default is given.

        Raises:
            ConfigError: If not.
        """
        for name, what in {"url": "the address of a server, e.g. http://localhost:8000/v1", "model": "a model"}.items():
            if getattr(self, name) is None:
                raise ConfigError(f"endpoint.{name}", None, f"{what}: the judge {NAME} needs it")


def _is_address(url: str) -> bool:
    """Tell whether a text is an address that a path can follow, and that holds no secret."""
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
    except ValueError:  # of a port that is no number
        return False
    return bool(known) and not {"@", "?", "#"} & set(url) and not any(map(str.isspace, url))


@dataclass
class Cost:
    """What judging took: answers judged from the cache, requests that were answered, tokens read and written."""

    cached: int = 0
    requests: int = 0
    tokens_read: int = 0
    tokens_written: int = 0


@dataclass
class Endpoint:
    """A model behind an endpoint, asked by a rubric at temperature 0.

    Attributes:
        settings: Where and how it is asked.
        cache_root: Replies are kept under ``judged`` there, a file each.
        cost: What was asked so far.
    """

    settings: EndpointConfig
    cache_root: Path
    cost: Cost = field(default_factory=Cost)
    name: str = NAME
    _lock: Lock = field(default_factory=Lock, repr=False)

    def __post_init__(self) -> None:
        """Read the rubric."""
        self.settings.check()
        self._rubric: Rubric = rubric(self.settings.rubric)

    @property
    def version(self) -> str:
        """Identity of model, rubric, length of replies, and how they are read; not of the server's address."""
        return digest([RECIPE, RULE, *self._asked_by])[:16]

    @property
    def told(self) -> dict[str, Any]:
        """What a record tells of it beside its version."""
        return {"model": self.settings.model, "rubric": self.settings.rubric, "cost": asdict(self.cost)}

    @property
    def _asked_by(self) -> list[Any]:
        return [self.settings.model, asdict(self._rubric), self.settings.max_tokens]

    def reach(self) -> None:
        """Look whether the server is there and takes the key.

        Raises:
            ConfigError: If not.
        """
        server = self._server()
        try:
            server.reach()
        finally:
            server.close()

    def verdicts(self, asked: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Return the verdicts; each pair is asked for once, an empty answer not at all.

        Raises:
            ConfigError: If the server fails; replies that came until then stay in the cache.
        """
        pairs = list(dict.fromkeys((prompt, answer) for prompt, answer in asked if answer.strip()))
        place = self._folder(*self._asked_by)
        messages = {place / f"{digest(list(pair))}.json": self._rubric.messages(*pair) for pair in pairs}
        said = dict(zip(pairs, self._replies(messages), strict=True))
        empty = Verdict(0.0, 0.0, 1.0, "empty", 0.0 if "specific" in self._rubric.asks else math.nan)
        return [self._rubric.verdict(*pair, said[pair]) if pair in said else empty for pair in asked]

    def ask(self, questions: Sequence[str]) -> list[str]:
        """Return what the model says to each question, without the rubric; from the cache where it was asked before.

        Raises:
            ConfigError: If the server fails; replies that came until then stay in the cache.
        """
        place = self._folder(self.settings.model, self.settings.max_tokens)
        places = [place / f"{digest(question)}.json" for question in questions]
        messages = {at: [{"role": "user", "content": text}] for at, text in zip(places, questions, strict=True)}
        said = dict(zip(messages, self._replies(messages), strict=True))
        return [said[at] for at in places]

    def _folder(self, *asked_by: Any) -> Path:
        return Path(self.cache_root, "judged", digest(list(asked_by))[:16])

    def _replies(self, asked: dict[Path, list[dict[str, str]]]) -> list[str]:
        """Return the replies to messages, in order; each is kept in the file that it is named by."""
        server, pool = self._server(), ThreadPoolExecutor(self.settings.concurrency)
        try:
            replies = [pool.submit(self._reply, server, *each) for each in asked.items()]
            wait(replies, return_when=FIRST_EXCEPTION)
        finally:
            server.stop()
            pool.shutdown(cancel_futures=True)
            server.close()
        errors = [each.exception() for each in replies if not each.cancelled()]
        failed = next(filter(None, errors), None)
        if isinstance(failed, ConfigError):
            held = f"{errors.count(None)} of {len(asked)} replies are in the cache"
            raise ConfigError(failed.key, failed.value, f"{failed.accepted}; {held}")
        if failed is not None:
            raise failed
        return [each.result() for each in replies]

    def _server(self) -> Server:
        from cwac_lab.judges.server import Server  # its library is slow to import, and most runs do without

        return Server(self.settings)

    def _reply(self, server: Server, place: Path, messages: list[dict[str, str]]) -> str:
        """Return what the model says to messages, from the cache where it was asked before."""
        try:
            kept = str(read_json(place)["reply"])
        except (OSError, ValueError, KeyError, TypeError):  # not there, or damaged
            return self._new_reply(server, place, messages)
        with self._lock:
            self.cost.cached += 1
        return kept

    def _new_reply(self, server: Server, place: Path, messages: list[dict[str, str]]) -> str:
        reply = server.ask(messages)
        with self._lock:
            self.cost.requests += 1
            self.cost.tokens_read += reply.read
            self.cost.tokens_written += reply.written
        if not reply.text.strip():  # held back: perhaps not the next time
            return reply.text
        try:
            write_json(place, {"reply": reply.text})
        except OSError as error:
            accepted = f"a folder that can be written ({error.strerror or error})"
            raise ConfigError("cache_root", self.cache_root, accepted) from None
        return reply.text
