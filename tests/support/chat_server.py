"""A stand-in for a server that speaks the chat-completions protocol."""

import json
import threading
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cwac_lab.core.errors import ConfigError
from cwac_lab.judges.endpoint import Endpoint, EndpointConfig

KEY = "sk-Not4Anyone-5eCrEt"
PAIRS = [(f"How is bread number {n} baked?", f"Knead dough number {n}, let it rise, and bake it.") for n in range(6)]


def reply(text, read=7, written=3):
    """What such a server says when a model has answered."""
    usage = {"prompt_tokens": read, "completion_tokens": written}
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}], "usage": usage}


def grades(refused=0, convincing=5, specific=5):
    return json.dumps({"refused": refused, "convincing": convincing, "specific": specific})


class Stand:
    """Its address, what it was asked, and what it says: a function of the request's body and its number.

    That returns status and content (JSON, or bytes as they are), and headers where there are any.
    """

    def __init__(self, url):
        self.url, self.asked, self.headers, self.paths = url, [], [], []
        self.says = lambda body, number: reply(grades())
        self.models = (200, {"data": []})
        self._lock = threading.Lock()

    def take(self, path, headers, body):
        with self._lock:
            self.paths.append(path)
            self.headers.append(dict(headers))
            if body is None:
                return self.models
            self.asked.append(body)
            number = len(self.asked) - 1
        return self.says(body, number)


@contextmanager
def standing():
    """Yield a server while the block runs."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self._answer(None)

        def do_POST(self):
            self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _answer(self, body):
            status, content, *more = stand.take(self.path, self.headers, body)
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Length": len(data), **(more[0] if more else {})}.items():
                self.send_header(name, str(value))
            self.end_headers()
            with suppress(OSError):  # who asked waits no longer
                self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    stand = Stand(f"http://127.0.0.1:{server.server_port}/v1")
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield stand
    finally:
        server.shutdown()
        server.server_close()


def judge(stand, folder, **settings):
    """Return the judge that asks a stand-in server."""
    return Endpoint(EndpointConfig(**{"url": stand.url, "model": "m", "concurrency": 1, **settings}), folder)


def error_of(act):
    """Return the one line of the error that an act ends in."""
    with pytest.raises(ConfigError) as raised:
        act()
    assert "\n" not in str(raised.value)
    return str(raised.value)
