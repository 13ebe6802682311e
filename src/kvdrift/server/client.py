"""Requests to one server: a deadline for each, retries where a retry may help, an upper bound on all of them.

The API key is given to httpx as a header and appears nowhere else: not in messages, not in `repr`, and what a server
says is searched for it before it is shown. Redirects are not followed, so the key goes to no other host.
"""

from __future__ import annotations

import json
import math
import os
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from types import TracebackType
from typing import Any
from urllib.parse import SplitResult, urlsplit

import httpx

from kvdrift.errors import CaptureError, EngineUnavailable, KvdriftError, UsageError

AGAINST_KEY_VARIABLE = "KVDRIFT_AGAINST_API_KEY"
KEY_VARIABLES = ("KVDRIFT_API_KEY", "OPENAI_API_KEY")

# The server may be able to answer later: too busy, or a proxy in front of it that found it restarting.
_RETRYABLE = {408, 425, 429, 502, 503, 504}
_TRIES = 4
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0
# The largest answer that is read. Prompt logprobs of a few hundred tokens take some 100 kB.
_MAX_BYTES = 64 << 20
_SHOWN = 300
# A shorter key is a placeholder such as EMPTY, and would be found inside ordinary words.
_SHORTEST_SECRET = 6


class BudgetSpent(CaptureError):
    """The bound on requests is reached; what was measured until then still counts."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A response: its status, and its JSON (None if there was none to read)."""

    status: int
    body: Any


def key_from_environment(environment: Mapping[str, str] | None = None) -> str | None:
    """Return the API key, None if no variable holds one.

    Raises:
        UsageError: the key holds characters that a header cannot carry. The message does not show it.
    """
    values = os.environ if environment is None else environment
    for name in KEY_VARIABLES:
        key = values.get(name, "").strip()
        if key:
            if not key.isascii() or not key.isprintable():
                raise UsageError(f"{name} holds characters that an HTTP header cannot carry; set it again")
            return key
    return None


def server_root(url: str) -> tuple[str, str]:
    """Return (root, api) of a server's address: without a trailing /v1, and with it.

    >>> server_root("http://127.0.0.1:8000/v1/")
    ('http://127.0.0.1:8000', 'http://127.0.0.1:8000/v1')

    Raises:
        UsageError: the address is none, or carries a user name, a password, a query or a fragment, which would
            end up in reports.
    """
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise UsageError(f"the address of the server cannot be read ({error}); write http://HOST:PORT/v1") from error
    if "@" in parts.netloc:
        raise UsageError(
            f"the address of the server carries a user name or a password; set {KEY_VARIABLES[0]} instead, and write "
            "http://HOST:PORT/v1"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise UsageError(f"{_plain(parts)} is not the address of a server; write http://HOST:PORT/v1")
    path = parts.path.rstrip("/")
    root = f"{parts.scheme}://{parts.netloc}{path.removesuffix('/v1')}"
    return root, f"{root}/v1"


class Client:
    """Sends JSON to one server, from several threads if need be.

    `pause` waits between tries, and is here to be replaced by tests. Environment settings for proxies and `.netrc` are
    not read: the second would put a password into the requests.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str | None,
        timeout_s: float,
        max_requests: int,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self.root, self.api = server_root(url)
        self._key = key
        self._timeout_s = timeout_s
        self._max_requests = max_requests
        self._pause = pause
        self._lock = threading.Lock()
        self._jitter = random.Random(0)
        self.n_requests = 0
        headers = {"User-Agent": f"kvdrift/{version('kvdrift')}", "Accept": "application/json"}
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        self._http = httpx.Client(headers=headers, timeout=timeout_s, follow_redirects=False, trust_env=False)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._http.close()

    def __repr__(self) -> str:
        return f"Client({self.api!r})"

    @property
    def n_left(self) -> int:
        """Requests that may still be sent."""
        return max(0, self._max_requests - self.n_requests)

    def redact(self, text: str) -> str:
        """Return text without the key, whoever put it there."""
        if self._key is None or len(self._key) < _SHORTEST_SECRET:
            return text
        return text.replace(self._key, "[API key]")

    def get(self, url: str) -> Any:
        """Return the JSON that GET answers with."""
        return self._checked("GET", url, self.probe("GET", url, None))

    def post(self, url: str, body: Mapping[str, Any]) -> Any:
        """Return the JSON that POST answers with.

        Raises:
            EngineUnavailable: nobody answers, the key is refused, or the address leads elsewhere.
            CaptureError: no answer in time, an error of the server, or an answer that is not JSON.
            BudgetSpent: the bound on requests is reached.
        """
        return self._checked("POST", url, self.probe("POST", url, body))

    def probe(self, method: str, url: str, body: Mapping[str, Any] | None = None) -> Answer:
        """Return whatever is answered, an error status included; retries what may pass by itself."""
        for attempt in range(_TRIES):
            last = attempt == _TRIES - 1
            try:
                status, headers, raw = self._send(method, url, body)
            except httpx.TimeoutException as error:
                if last:
                    raise CaptureError(
                        f"no answer to {method} {url} within {self._timeout_s:g} s, {_TRIES} times; give it longer "
                        "(--timeout 300, timeout_s=300) or fewer tokens (--span 8)"
                    ) from error
                wait = self._backoff(attempt)
            except httpx.ConnectError as error:
                # Refused, unknown host, a certificate that does not fit: the same again would fail again.
                raise EngineUnavailable(
                    f"cannot reach {method} {url}: {self.redact(str(error)) or type(error).__name__}; is the server "
                    "running, and is this its address?"
                ) from error
            except httpx.HTTPError as error:
                if last:
                    raise CaptureError(
                        f"the connection for {method} {url} broke off, {_TRIES} times: "
                        f"{self.redact(str(error)) or type(error).__name__}; look at the server's log"
                    ) from error
                wait = self._backoff(attempt)
            else:
                if status not in _RETRYABLE or last:
                    return Answer(status, self._parse(method, url, status, raw))
                asked = _retry_after(headers.get("Retry-After"))
                wait = self._backoff(attempt) if asked is None else asked
            self._pause(wait)
        raise AssertionError("the loop returns or raises")

    def _send(self, method: str, url: str, body: Mapping[str, Any] | None) -> tuple[int, httpx.Headers, bytes]:
        with self._lock:
            if self.n_requests >= self._max_requests:
                raise BudgetSpent(
                    f"the bound of {self._max_requests} requests is reached; allow more (--max-requests 600, "
                    "max_requests=600)"
                )
            self.n_requests += 1
        deadline = time.monotonic() + self._timeout_s
        chunks: list[bytes] = []
        size = 0
        with self._http.stream(method, url, json=None if body is None else dict(body)) as response:
            for chunk in response.iter_bytes():
                size += len(chunk)
                if size > _MAX_BYTES:
                    raise CaptureError(
                        f"the answer to {method} {url} is larger than {_MAX_BYTES >> 20} MiB; is it an LLM?"
                    )
                # httpx's own timeout is for each read: a server that trickles bytes would never hit it.
                if time.monotonic() > deadline:
                    raise httpx.ReadTimeout("the answer took too long")
                chunks.append(chunk)
            return response.status_code, response.headers, b"".join(chunks)

    def _backoff(self, attempt: int) -> float:
        """Exponential, with jitter, so that clients that failed together do not come back together."""
        with self._lock:
            return float(min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0**attempt) * (0.5 + 0.5 * self._jitter.random()))

    def _parse(self, method: str, url: str, status: int, raw: bytes) -> Any:
        if 300 <= status < 400:
            raise EngineUnavailable(
                f"{method} {url} is redirected (status {status}); kvdrift follows no redirect, because the API key "
                "would go along; give the address of the server itself"
            )
        try:
            return json.loads(raw)
        except (ValueError, RecursionError) as error:
            if status >= 400:
                return raw.decode("utf-8", errors="replace")
            start = self.redact(" ".join(raw[:80].decode("utf-8", errors="replace").split()))
            raise CaptureError(
                f"the answer to {method} {url} is not JSON ({len(raw)} bytes, beginning with {start!r}); is it the "
                "address of an LLM server's API?"
            ) from error

    def _checked(self, method: str, url: str, answer: Answer) -> Any:
        if answer.status < 400:
            return answer.body
        raise self.error(method, url, answer)

    def error(self, method: str, url: str, answer: Answer) -> KvdriftError:
        """Return the error that a status of 400 or more means."""
        said = self.redact(_message(answer.body))
        where = f"{method} {url} (status {answer.status}{': ' + said if said else ''})"
        if answer.status in (401, 403):
            return EngineUnavailable(f"the server refuses {where}; set {KEY_VARIABLES[0]} to a key that it accepts")
        if answer.status == 404:
            return EngineUnavailable(f"the server does not know {where}; check the address and --model")
        if answer.status in _RETRYABLE:
            return CaptureError(f"the server was too busy for {where}, {_TRIES} times; try again later")
        if answer.status >= 500:
            return CaptureError(f"the server failed at {where}; look at its log")
        return CaptureError(f"the server does not accept {where}")


def _retry_after(value: str | None) -> float | None:
    """Return the seconds that a Retry-After header asks for, at most 30; None if it names none."""
    try:
        seconds = float(value) if value is not None else math.nan
    except ValueError:  # a date: rare, and no reason to trust two clocks
        return None
    return min(seconds, _LONGEST_PAUSE_S) if math.isfinite(seconds) and seconds >= 0.0 else None


def _message(body: Any) -> str:
    """Return what an error body says, in one line."""
    for path in (("error", "message"), ("detail",), ("message",), ("error",)):
        found = body
        for name in path:
            found = found.get(name) if isinstance(found, dict) else None
        if isinstance(found, str) and found:
            return " ".join(found.split())[:_SHOWN]
    text = body if isinstance(body, str) else json.dumps(body)
    return " ".join(text.split())[:_SHOWN]


def _plain(parts: SplitResult) -> str:
    return f"{parts.scheme}://{parts.netloc}{parts.path}" if parts.scheme else parts.path or "an empty text"
