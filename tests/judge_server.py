"""A judge behind a real local HTTP server, for tests of endpoints."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


class Server:
    """A judge on a port of its own: ``reply`` maps (message, number of the request) to a text or a status."""

    def __init__(self, reply: Callable[[str, int], str | int], port: int = 0) -> None:
        self.seen: list[dict] = []
        lock, outer = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.seen.append(body)
                    text = reply(body["messages"][0]["content"], len(outer.seen))
                status = text if isinstance(text, int) else 200
                data = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    """Yield what starts servers, which end with the block; no key and no proxy of the environment is used."""
    for name in ("http_proxy", "HTTP_PROXY", "DACO_RT_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    running: list[Server] = []

    def start(reply: Callable[[str, int], str | int], port: int = 0) -> Server:
        running.append(Server(reply, port))
        return running[-1]

    yield start
    for server in running:
        server.http.shutdown()
        server.http.server_close()


def closed_port() -> int:
    """Return a port on which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
