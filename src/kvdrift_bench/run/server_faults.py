"""Faults of decode planted into a real llama-server: a proxy in front of it changes what a generation starts from.

Requests that score a given token pass through as they are. A request that generates is changed: its prompt, or the rows
of its cache, which the server itself saves to a file, takes back from it and decodes on.
"""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

from kvdrift_bench.run.llama_server import started

Rows = NDArray[np.float16]
# Changes the rows [cell, value] of K and V by layer, in place.
Edit = Callable[[list[Rows], list[Rows]], None]
_FILE = "rows.bin"
_TIMEOUT_S = 120.0
# How long a generation waits for a neighbour before it counts as one alone.
_COMPANY_S = 0.05


@dataclass(frozen=True, slots=True)
class ServerFault:
    """A fault by what it does to the prompt of a generation, or to its cache; `settings` are the server's own.

    `beside` multiplies the logprobs of a generation that has neighbours in flight, and of no other.
    """

    name: str
    change: Callable[[list[int]], list[int]] | None = None
    edit: Edit | None = None
    beside: float | None = None
    settings: tuple[tuple[str, str], ...] = ()


def stale_slot(layer: int) -> Edit:
    """Let one slot in the middle of the prompt hold, in one layer, what the slot in front of it holds."""

    def edit(keys: list[Rows], values: list[Rows]) -> None:
        middle = len(keys[layer]) // 2
        for rows in (keys[layer], values[layer]):
            rows[middle] = rows[middle - 1]

    return edit


def turned_back(head_dim: int, base: float) -> Edit:
    """Turn every key of the prompt back by one position: each query then stands one too far from all of them.

    The pairs that RoPE turns are neighbours (2i, 2i + 1), as in llama.cpp's Llama, by base^(-2i / head_dim).
    """
    angles = base ** (-np.arange(0, head_dim, 2) / head_dim)
    cos, sin = np.cos(angles), np.sin(angles)

    def edit(keys: list[Rows], values: list[Rows]) -> None:
        for rows in keys:
            pairs = rows.astype(np.float64).reshape(len(rows), -1, head_dim // 2, 2)
            one, other = pairs[..., 0], pairs[..., 1]
            turned = np.stack((one * cos + other * sin, other * cos - one * sin), axis=-1)
            rows[:] = turned.reshape(rows.shape).astype(np.float16)

    return edit


TWICE_FED = ServerFault("the last prompt token fed twice", change=lambda ids: [*ids, ids[-1]])


def edit_state(raw: bytes, edit: Edit) -> bytes:
    """Return a saved slot with its rows changed.

    Raises:
        ValueError: the file is not laid out as expected: one stream of float16 rows, V as rows (flash attention on).
    """
    n_told = struct.unpack_from("<I", raw, 8)[0]
    at = 12 + 4 * n_told
    n_streams, n_cells = struct.unpack_from("<II", raw, at)
    at += 8 + 12 * n_cells
    transposed, n_layers = struct.unpack_from("<II", raw, at)
    at += 16  # two more words, zero here
    if n_streams != 1 or transposed:
        raise ValueError(f"{n_streams} streams, V transposed: {bool(transposed)}; rows cannot be found")
    out = bytearray(raw)
    sides: list[list[Rows]] = []
    for _ in range(2):
        side = []
        for _ in range(n_layers):
            kind, size = struct.unpack_from("<iQ", raw, at)
            if kind != 1 or size % 2:
                raise ValueError(f"a row of type {kind} with {size} bytes is not float16")
            side.append(np.frombuffer(out, np.float16, n_cells * size // 2, at + 12).reshape(n_cells, size // 2))
            at += 12 + n_cells * size
        sides.append(side)
    if at != len(raw):
        raise ValueError(f"{len(raw) - at} bytes are left behind the last row")
    edit(*sides)
    return bytes(out)


@contextmanager
def faulty(model: Path, fault: ServerFault, folder: Path, **settings: str | int | bool) -> Iterator[str]:
    """Serve a GGUF file with a fault while the context is open, and yield the address; `folder` takes saved slots."""
    given: dict[str, str | int | bool] = {**settings, **dict(fault.settings)}
    if fault.edit is not None:
        given["slot_save_path"] = f"{folder}/"
    with started(model, **given) as url:
        if fault.change is None and fault.edit is None and fault.beside is None:
            yield url
            return
        proxy = _Proxy(url.removesuffix("/v1"), fault, folder)
        thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{proxy.server_address[1]}/v1"
        finally:
            proxy.shutdown()
            proxy.server_close()
            thread.join()
            proxy.http.close()


class _Proxy(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, root: str, fault: ServerFault, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root, self.fault, self.folder = root, fault, folder
        self.http = httpx.Client(timeout=_TIMEOUT_S, trust_env=False)
        # Saving, changing and decoding belong together; nothing else may take the slot in between.
        self.lock = threading.Lock()
        self.counting = threading.Condition()
        self.n_flying = 0

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is not a reason to print a traceback."""

    def ask(self, method: str, path: str, body: Any) -> httpx.Response:
        return self.http.request(method, self.root + path, json=body)

    def generate(self, body: dict[str, Any]) -> httpx.Response:
        """Answer a generation as the faulty server does."""
        fault = self.fault
        if fault.beside is not None:
            return self.beside(body, fault.beside)
        if fault.change is not None:
            return self.ask("POST", "/completion", {**body, "prompt": fault.change(body["prompt"])})
        assert fault.edit is not None
        with self.lock:
            filling = {"prompt": body["prompt"], "n_predict": 0, "cache_prompt": False, "id_slot": 0}
            self.ask("POST", "/completion", filling).raise_for_status()
            self.ask("POST", "/slots/0?action=save", {"filename": _FILE}).raise_for_status()
            file = self.folder / _FILE
            file.write_bytes(edit_state(file.read_bytes(), fault.edit))
            self.ask("POST", "/slots/0?action=restore", {"filename": _FILE}).raise_for_status()
            return self.ask("POST", "/completion", {**body, "cache_prompt": True, "id_slot": 0})

    def beside(self, body: dict[str, Any], factor: float) -> httpx.Response:
        """Answer a generation, with its logprobs multiplied if another one came in the meantime or was there."""
        with self.counting:
            self.n_flying += 1
            self.counting.notify_all()
            has_company = self.counting.wait_for(lambda: self.n_flying > 1, timeout=_COMPANY_S)
        answer = self.ask("POST", "/completion", body)
        with self.counting:
            self.n_flying -= 1
        if not has_company:
            return answer
        told = answer.json()
        for step in told["completion_probabilities"]:
            for item in (step, *step["top_logprobs"]):
                item["logprob"] *= factor
        return httpx.Response(answer.status_code, json=told)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Head and body are two writes, and the second would wait 40 ms for an acknowledgement.
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        """Keep stderr clean."""

    def do_GET(self) -> None:
        self._pass(None)

    def do_POST(self) -> None:
        self._pass(json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0)))))

    def _pass(self, body: Any) -> None:
        proxy = self.server
        assert isinstance(proxy, _Proxy)
        generates = self.path == "/completion" and body.get("n_predict", 0) > 0 and not body.get("logit_bias")
        answer = proxy.generate(body) if generates else proxy.ask(self.command, self.path, body)
        self.send_response(answer.status_code)
        self.send_header("Content-Type", answer.headers.get("Content-Type", "application/json"))
        self.send_header("Content-Length", str(len(answer.content)))
        self.end_headers()
        self.wfile.write(answer.content)
