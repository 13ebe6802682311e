"""A gateway in front of a server: it passes requests on over HTTP, and does to some of them what gateways do."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx

HTML = b"<!DOCTYPE html><html><head><title>nginx</title></head><body><h1>Gateway</h1></body></html>"


@dataclass(frozen=True)
class Trouble:
    """What becomes of one request: an answer of the gateway's own, or what it does to that of the server.

    `status` is of an answer of its own with `body`; `trickle_s` is a pause after each eighth of the server's answer,
    and `share` how much of it is sent before the connection is closed.
    """

    status: int | None = None
    body: bytes = HTML
    headers: dict[str, str] = field(default_factory=dict)
    trickle_s: float = 0.0
    share: float = 1.0


# The number of a completion, from 0, to its trouble.
Policy = Callable[[int], Trouble | None]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        """Keep stderr clean."""

    def do_GET(self) -> None:
        self._pass(None, None)

    def do_POST(self) -> None:
        gateway: Any = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        counts = self.path.endswith(("/completions", "/completion", "/generate"))
        self._pass(body, gateway.policy(next(gateway.numbers)) if counts else None)

    def _pass(self, body: bytes | None, trouble: Trouble | None) -> None:
        gateway: Any = self.server
        trouble = trouble or Trouble()
        if trouble.status is not None:
            status, kind, raw = trouble.status, "text/html", trouble.body
        else:
            answer = gateway.http.request(
                self.command, gateway.upstream + self.path, content=body, headers={"Content-Type": "application/json"}
            )
            status, kind, raw = answer.status_code, "application/json", answer.content
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(raw)), **trouble.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        step = max(1, len(raw) // 8)
        for start in range(0, int(len(raw) * trouble.share), step):
            self.wfile.write(raw[start : start + step])
            self.wfile.flush()
            time.sleep(trouble.trickle_s)
        self.close_connection = trouble.share < 1.0


class _Gateway(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, upstream: str, policy: Policy) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream, self.policy, self.numbers = upstream, policy, itertools.count()
        self.http = httpx.Client(timeout=60.0, trust_env=False)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is not a reason to print a traceback."""


@contextmanager
def gateway(url: str, policy: Policy) -> Iterator[str]:
    """Stand in front of the server at `url` while the context is open, and yield the gateway's address."""
    server = _Gateway(url.removesuffix("/v1"), policy)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        server.http.close()
