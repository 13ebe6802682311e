"""llama.cpp's own HTTP server, as the wheel of xllamacpp ships it, in a process of its own on the loopback interface.

`started` runs this module as that process. What is left out of `settings` has the default of llama.cpp; xllamacpp
serves one slot where llama-server serves four, so that both are named.
"""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from kvdrift.errors import EngineUnavailable

_START_S = 120.0
# Words of llama-server's command line for a member of an enumeration.
_TYPES = ("cache_type_k", "cache_type_v")


@contextmanager
def started(model: Path, **settings: str | int | bool) -> Iterator[str]:
    """Serve a GGUF file while the context is open, and yield the address.

    Args:
        model: the file.
        settings: fields of llama.cpp's `common_params`; cache types as in "q8_0", `flash_attn` as "auto", "enabled" or
            "disabled", `threads` for both kinds of threads (default 1).

    Raises:
        EngineUnavailable: xllamacpp is not installed, or the server does not answer in time.
    """
    if importlib.util.find_spec("xllamacpp") is None:
        raise EngineUnavailable("a real llama-server needs 'xllamacpp'; pip install 'kvdrift[bench]'")
    port = _free_port()
    words = [f"{name}={value}" for name, value in settings.items()]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(model), str(port), *words],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
        )
        try:
            deadline = time.monotonic() + _START_S
            while not _answers(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    tail = "\n".join(log.read().decode(errors="replace").splitlines()[-10:])
                    raise EngineUnavailable(f"llama-server did not start:\n{tail}")
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            # Its standard input ends with this process, however this process ends: no server is left behind.
            process.communicate()
            process.wait(30)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=5.0, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def _serve(model: str, port: int, words: list[str]) -> None:
    """Serve until standard input ends."""
    import os

    import xllamacpp

    settings: dict[str, Any] = {"n_parallel": "1", "n_ctx": "2048", "threads": "1", "ctx_shift": "false"}
    settings |= dict(word.split("=", 1) for word in words)
    params = xllamacpp.CommonParams()
    params.model.path, params.hostnames, params.port, params.model_alias = model, ["127.0.0.1"], port, {"m"}
    n_threads = int(settings.pop("threads"))
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = n_threads
    for name, text in settings.items():
        if name in _TYPES:
            setattr(params, name, getattr(xllamacpp.ggml_type, f"GGML_TYPE_{text.upper()}"))
        elif name == "flash_attn":
            kind = getattr(xllamacpp.llama_flash_attn_type, f"LLAMA_FLASH_ATTN_TYPE_{text.upper()}")
            params.flash_attn_type = kind
        elif text.lower() in ("true", "false"):
            setattr(params, name, text.lower() == "true")
        else:
            setattr(params, name, int(text) if text.isdigit() else text)
    server = xllamacpp.Server(params)
    assert server is not None
    sys.stdin.read()
    os._exit(0)  # the server's own threads would be waited for


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
